"""Owns the sizes that code of kbop_core fixes: of one layer, one token, one moment, in bytes; torch is not needed.

Refuses to know ranks, phases and peaks (memory_plan.py). Each constant names the module whose tensors it counts;
tests/unit/jobs/test_memory_plan.py compares them with living tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from jobs.model_shape import Linear, ModelShape

#: Random projections that measure second moments (moments.py), and rows whose first signs are kept (reversals.py).
PROBES, SAMPLED_ROWS = 16, 16
#: Reduce-scatters that overlap with backward (kbop.py), and bytes of a gradient on its way (shard.py, `Gang.wire`).
IN_FLIGHT, WIRE = 1, 2
#: Weights of a row that share a scale in int8 evidence, and weights that are decoded at a time (evidence.py).
EVIDENCE_BLOCK, EVIDENCE_AT_ONCE = 64, 2**24
#: Numbers of (n, V) that the whole KL works on at once, float32 arrays of them that live then, and (n, V) arrays in the
#: logits' dtype: student, teacher, gradient (distill.py).
KL_CHUNK, KL_PIECES, KL_LOGITS = 2**24, 5, 3
#: The same of the KL to a cached teacher's top tokens; its (n, V) arrays are student and gradient.
TOP_KL_PIECES, TOP_KL_LOGITS = 2, 2
#: Bytes of a candidate for a flip while it waits: value, place (selection.py).
CANDIDATE = 8
#: Bytes more of each candidate that is looked at while thresholds are found, and how many are together (selection.py).
SELECTION, HANDFUL = 25, 2**22
#: Layers up to so many scores, or with a candidate in so few of them, are sorted whole (selection.py).
SORTED_WHOLE, SORTED_SHARE = 65_536, 16
#: Bytes of bits that are gathered at a time, about (kbop.py).
BITS_AT_ONCE = 2**24
#: A threshold takes so many sums over ranks of so many counts of 4 bytes a layer (selection.py).
HISTOGRAMS, COUNTS = 4, 256
#: Of a cached teacher: tokens kept at each position, bytes of a log-probability, of the rest's (target_cache.py).
CACHE_TOP, CACHE_VALUE_BYTES, CACHE_REST_BYTES = 64, 2, 2
#: Logits that a teacher makes at once while its targets are written (jobs/stages/teacher.py), windows of a file, and
#: float32 arrays of these logits alive while the likeliest tokens are found.
TARGET_LOGITS, TARGET_WINDOWS, TARGET_COPIES = 2**24, 64, 3
#: Bytes of a kept token at each position: its id as int64, the teacher's log-probability, the student's (distill.py).
TARGET_BYTES = 16
#: Vocabularies up to this many tokens have ids of 2 bytes, others of 4.
SHORT_IDS = 65_536
#: Elements of ZeRO's buckets (engine.py): allocated whole on a GPU, touched as needed on a CPU.
ZERO_BUCKET = 2**25
#: ZeRO-3, DeepSpeed's defaults: elements gathered at once ahead of use, elements whole at any time, and the size up to
#: which a parameter is whole on every rank all the time.
PREFETCH, LIVE, PERSISTENT = 50_000_000, 1_000_000_000, 100_000
#: Complete training checkpoints on disk, and the one that is being written (training_state.py).
CHECKPOINTS = 3


def groups_of(layer: Linear, group_size: int) -> int:
    """Scales of a row: I/group_size where that is a whole number, else one (layers.py)."""
    return layer.in_features // group_size if layer.in_features % group_size == 0 else 1


def first_sign_bytes(layer: Linear, rows: int) -> int:
    """Bytes of the first signs of the sampled rows among rank 0's `rows` rows of a layer."""
    stride = max(1, layer.out_features // SAMPLED_ROWS)
    return ceil(rows / stride) * ceil(layer.in_features / 8)


def activation_bytes(shape: ModelShape, element: int) -> int:
    """Bytes per token that one decoder block keeps for its backward pass.

    RMSNorm keeps its input in float32 and both products in w; SiLU, its product with `up` and `down`'s input are kept;
    attention keeps rotated queries and keys, values, its result (the output layer's input) and a float32 a head.
    """
    w, queries, keys = element, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = w * (2 * queries + 2 * keys) + 4 * shape.heads
    if shape.family == "llama":
        norms = 2 * (shape.hidden * (4 + 2 * w) + 4)
        head_norms = (queries + keys) * (4 + w) + 4 * (shape.heads + shape.kv_heads) if shape.qk_norm else 0
        return norms + head_norms + attention + 4 * w * shape.ffn
    norms = 2 * (2 * w * shape.hidden + 8)
    return norms + attention + w * shape.ffn * (5 if shape.family == "gpt2" else 1)


def final_norm_bytes(shape: ModelShape, element: int) -> int:
    """Bytes per token that the last norm and the head keep."""
    return shape.hidden * (4 + 2 * element) + 4 if shape.family == "llama" else 2 * element * shape.hidden + 8


def choosing_bytes(scores: int, wanted: int) -> int:
    """Bytes that the `wanted` largest of so many float32 scores take while they are found, beside the scores."""
    found = min(wanted, scores)
    if scores > SORTED_WHOLE and wanted * SORTED_SHARE < scores:  # a bound leaves about twice as many: a mask, places
        return 16 * found + max(scores, 28 * found)
    return 8 * scores + max(4 * scores + 12 * found, 20 * found + 8 * wanted)


def columns_bytes(columns: int, ranks: int) -> int:
    """Bytes that the second moments of so many columns take when a step's projections are summed over ranks (kbop.py).

    The projections of all layers side by side, their squares in float64 of the own part, and heights.
    """
    held, own = columns * (4 * PROBES + 4) + 8 * ceil(columns / ranks), ceil(columns / ranks)
    squares = own * (8 * PROBES + 8)
    if ranks == 1:
        return held + squares
    arrived = 4 * PROBES * (columns + own)
    return held + max(8 * PROBES * columns, arrived, 4 * PROBES * own + squares)


def largest_handful(sizes: Sequence[int], most: int) -> int:
    """Of consecutive sizes put together while they are at most `most`, or one larger, the largest sum."""
    largest = held = 0
    for size in sizes:
        held = size if held + size > most else held + size
        largest = max(largest, held)
    return largest


def gathered_pieces(sizes: Sequence[int], enough: int) -> list[int]:
    """Sums of consecutive sizes, each closed by the one that reaches `enough`."""
    pieces = [0]
    for size in sizes:
        if pieces[-1] >= enough:
            pieces.append(0)
        pieces[-1] += size
    return pieces


def cached_token_bytes(vocabulary: int) -> int:
    """Bytes on disk for one position of a cached teacher: ids and log-probabilities of the top, and the rest's."""
    return CACHE_TOP * ((2 if vocabulary <= SHORT_IDS else 4) + CACHE_VALUE_BYTES) + CACHE_REST_BYTES
