"""Owns how many bytes a training rank holds, and when: the parts of the peak, from sizes alone.

Refuses to measure, and to know devices, time or money (plan.py); imports no torch, so that a server can use it.

A rank's memory is what lives all the time (bits, evidence, moments, full-precision parameters with their optimizer,
teacher) plus what lives in one moment of a step. The moments are walked in order and the largest sum is the peak:

    build → forward → teacher → loss → backward → flips → optimizer

Every formula counts tensors of the code it names. n = micro_batch · context, w = bytes of an element (4 on CPUs, 2 on
GPUs, bfloat16), N ranks, O·I weights in a layer, D hidden, F MLP, V vocabulary, P full-precision parameters:

| part | bytes on a rank | code |
|---|---|---|
| bits | Σ O·⌈I/8⌉, all rows on every rank | layers.py |
| evidence | 2 R·I, or R·(I + 4⌈I/64⌉); R = ⌈O/N⌉ rows | evidence.py |
| moments | 4 (R + I)(1 + PROBES) a layer, and the probes | kbop.py |
| parameters | w P; ZeRO-3: w P/N and what is gathered | engine.py |
| optimizer | AdamW 8 P, master copy 4 P; ZeRO ≥ 1: both /N | DeepSpeed |
| activations | see `activation_bytes` | transformers' blocks |
| loss | KL_COPIES · 4 n V: student, teacher, log p, log q, p, and two products | distill.py |
| gradients in flight | (IN_FLIGHT + 1) · w O·I (1 + 1/N) of the largest layers | kbop.py, shard.py |
| flips | the best scores of all ranks: 4 N + 16 bytes for each; scores of one layer | kbop.py |

tests/unit/jobs/test_memory_plan.py compares them with live tensors, `make bench-plan` with processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil

from jobs.errors import BadPlan
from jobs.model_shape import Linear, ModelShape
from jobs.plan_request import PlanRequest

#: Random projections that measure second moments (kbop.py), and reduce-scatters that overlap with backward.
PROBES, IN_FLIGHT = 16, 2
#: Weights of a row that share a scale in int8 evidence (evidence.py).
EVIDENCE_BLOCK = 64
#: (n, V) float32 arrays alive at once inside the whole KL (distill.py); in bfloat16 two are halves and one is added.
KL_COPIES = 7
#: The same for the KL of a cached teacher's top tokens, in its backward pass.
TOP_KL_COPIES = 5
#: Of a cached teacher: tokens kept at each position, bytes of a log-probability, and of the rest's.
CACHE_TOP, CACHE_VALUE_BYTES, CACHE_REST_BYTES = 64, 2, 2
#: Vocabularies up to this many tokens have ids of 2 bytes, others of 4.
SHORT_IDS = 65_536
#: Blocks of an offloaded teacher that are on the device at once.
STREAMED_BLOCKS = 1
#: Elements of DeepSpeed's gradient bucket (`reduce_bucket_size`), allocated whole on a GPU, touched as needed on a CPU.
REDUCE_BUCKET = 500_000_000
#: Elements that ZeRO-3 gathers ahead of use (`stage3_prefetch_bucket_size`).
PREFETCH = 50_000_000


def groups_of(layer: Linear, group_size: int) -> int:
    """Scales of a row: I/group_size where that is a whole number, else one (layers.py)."""
    return layer.in_features // group_size if layer.in_features % group_size == 0 else 1


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


def cached_token_bytes(vocabulary: int) -> int:
    """Bytes on disk for one position of a cached teacher: ids and log-probabilities of the top, and the rest's."""
    return CACHE_TOP * ((2 if vocabulary <= SHORT_IDS else 4) + CACHE_VALUE_BYTES) + CACHE_REST_BYTES


@dataclass(frozen=True)
class Phase:
    """One moment of a run: its name, and what lives then in bytes, by name."""

    name: str
    parts: dict[str, int]

    @property
    def bytes(self) -> int:
        """Of all parts."""
        return sum(self.parts.values())

    @property
    def largest(self) -> str:
        """Name of the largest part."""
        return max(self.parts, key=lambda name: self.parts[name])


@dataclass(frozen=True)
class MemoryPlan:
    """The bytes of rank 0, which owns the most rows, in every moment of a run."""

    shape: ModelShape
    request: PlanRequest

    # -- what is counted ------------------------------------------------------------------------------------------

    @cached_property
    def binary(self) -> tuple[Linear, ...]:
        """The layers that become binary."""
        found = self.shape.binary(self.request.keep)
        if not found:
            raise BadPlan(f"keep leaves nothing of {self.shape.name!r} to binarize", "keep fewer layers")
        return found

    @property
    def binary_weights(self) -> int:
        """Σ O·I."""
        return sum(la.weights for la in self.binary)

    @property
    def scales(self) -> int:
        """Σ O·G."""
        return sum(la.out_features * groups_of(la, self.request.group_size) for la in self.binary)

    @property
    def real(self) -> int:
        """P: full-precision parameters, scales included."""
        return self.shape.parameters - self.binary_weights + self.scales

    @property
    def largest(self) -> Linear:
        """The binary layer with the most weights."""
        return max(self.binary, key=lambda la: la.weights)

    @property
    def largest_real(self) -> int:
        """Elements of the largest group of full-precision parameters: embedding and head learn at one rate."""
        return max(self.shape.embedding + self.shape.head, self.scales // len(self.binary))

    def rows(self, layer: Linear) -> int:
        """⌈O/N⌉."""
        return ceil(layer.out_features / self.request.ranks)

    def _shard(self, elements: int, from_stage: int) -> int:
        """Elements on this rank: a part of them from that ZeRO stage on."""
        return ceil(elements / self.request.ranks) if self.request.zero_stage >= from_stage else elements

    # -- what lives all the time ----------------------------------------------------------------------------------

    @cached_property
    def bits(self) -> int:
        """Packed signs of all layers."""
        return sum(la.out_features * ceil(la.in_features / 8) for la in self.binary)

    @cached_property
    def evidence(self) -> int:
        """Evidence of the rows owned here."""
        if self.request.evidence == "bfloat16":
            return sum(2 * self.rows(la) * la.in_features for la in self.binary)
        return sum(self.rows(la) * (la.in_features + 4 * ceil(la.in_features / EVIDENCE_BLOCK)) for la in self.binary)

    @cached_property
    def moments(self) -> int:
        """Second moments of rows and columns, their sketches, and the probes."""
        widest = max(max(la.in_features, la.out_features) for la in self.binary)
        return 4 * (sum((self.rows(la) + la.in_features) * (1 + PROBES) for la in self.binary) + widest * PROBES)

    @cached_property
    def parameters(self) -> int:
        """Full-precision parameters; under ZeRO-3 what is gathered for use counts too."""
        held = self.request.element * self._shard(self.real, 3)
        if self.request.zero_stage == 3 and self.request.ranks > 1:
            held += self.request.element * (self.largest_real + min(PREFETCH, self.real))
        return held

    @cached_property
    def optimizer(self) -> int:
        """AdamW's two moments, and the float32 master copy, which ZeRO makes also of float32 parameters."""
        master = 4 if self.request.zero_stage or self.request.element < 4 else 0
        return (8 + master) * self._shard(self.real, 1)

    @cached_property
    def teacher(self) -> int:
        """The teacher while it does not run."""
        w, outside = self.request.element, self.shape.embedding + self.shape.head
        return {
            "resident": w * self.shape.parameters,
            "offloaded": w * outside,
            "sharded": w * ceil(self.shape.parameters / self.request.ranks),
            "cached": 0,
        }[self.request.teacher]

    @property
    def _lasting(self) -> dict[str, int]:
        return {
            "bits": self.bits,
            "evidence": self.evidence,
            "moments": self.moments,
            "parameters": self.parameters,
            "optimizer": self.optimizer,
            "teacher": self.teacher,
        }

    # -- moments --------------------------------------------------------------------------------------------------

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """Every moment, in order."""
        logits = self._vocabulary_rows
        between = {"activations": self._kept_activations, "gradients": self._gradients_between}
        dense = ceil(self.request.element * self.largest.weights + self.largest.weights / 2)
        return (
            Phase("build", {"teacher": self.teacher, **self._build}),
            self._phase("forward", **between, dense_weight=dense, loss=self.request.element * logits),
            self._phase("teacher", **between, loss=self.request.element * logits, teacher_run=self._teacher_run),
            self._phase("loss", **between, loss=self._loss),
            self._phase("backward", **self._backward),
            self._phase("flips", gradients=self._gradients_at_step, flips=self._flips),
            self._phase("optimizer step", gradients=self._gradients_at_step, update=self._update),
        )

    @property
    def peak(self) -> Phase:
        """The moment with the most bytes."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def training_peak(self) -> Phase:
        """The same without the building of the student."""
        return max(self.phases[1:], key=lambda phase: phase.bytes)

    def _phase(self, name: str, **parts: int) -> Phase:
        return Phase(name, self._lasting | parts)

    @property
    def _build(self) -> dict[str, int]:
        """The student when its first layer is converted: dense, with two float32 copies of that layer's weight."""
        w, copies = self.request.element, 8 * self.largest.weights
        if self.request.build == "blocks":
            outside = self.shape.parameters - sum(la.weights for la in self.shape.linears)
            block = ceil(sum(la.weights for la in self.shape.linears) / self.shape.blocks)
            return {"student": w * (outside + block) + self.bits + 4 * self.scales, "dense_weight": copies}
        return {"student": w * self.shape.parameters, "dense_weight": copies}

    @property
    def _vocabulary_rows(self) -> int:
        """n·V."""
        return self.request.micro_tokens * self.shape.vocabulary

    @property
    def _block_activations(self) -> int:
        return self.request.micro_tokens * activation_bytes(self.shape, self.request.element)

    @cached_property
    def _kept_activations(self) -> int:
        """What forward leaves for backward."""
        n, w = self.request.micro_tokens, self.request.element
        end = n * final_norm_bytes(self.shape, w)
        if self.request.activation_checkpointing:
            return self.shape.blocks * n * w * self.shape.hidden + end
        return self.shape.blocks * self._block_activations + end

    @property
    def _gradients_between(self) -> int:
        """Full-precision gradients that earlier micro-steps of the step left."""
        return self.request.element * self._shard(self.real, 2) if self.request.micro_steps > 1 else 0

    @property
    def _gradients_at_step(self) -> int:
        """Full-precision gradients after the last backward pass: all of them under ZeRO 0 and 1, and the own part."""
        w = self.request.element
        others = w * (self.real - self._shard(self.real, 1)) if self.request.zero_stage == 1 else 0
        return others + w * self._shard(self.real, 1)

    @property
    def _teacher_run(self) -> int:
        """What the teacher's forward pass needs beyond what it holds."""
        n, w, request = self.request.micro_tokens, self.request.element, self.request
        if request.teacher == "cached":
            return 0
        block = ceil(w * sum(la.weights for la in self.shape.linears) / self.shape.blocks)
        streamed = STREAMED_BLOCKS * block if request.teacher in ("offloaded", "sharded") else 0
        inside = n * w * (2 * self.shape.hidden + 3 * self.shape.ffn)
        return streamed + max(inside, w * self._vocabulary_rows)

    @property
    def _loss(self) -> int:
        if self.request.teacher == "cached":
            return TOP_KL_COPIES * 4 * self._vocabulary_rows
        return KL_COPIES * 4 * self._vocabulary_rows

    @property
    def _backward(self) -> dict[str, int]:
        """When the last block's layers meet: nothing of the activations is freed, the largest gradients exist."""
        again = self._block_activations if self.request.activation_checkpointing else 0
        w, head = self.request.element, self.shape.vocabulary * self.shape.hidden
        before = self._gradients_between
        fresh = 0 if before and self.request.zero_stage < 2 else w * head
        bucket = w * REDUCE_BUCKET if self.request.zero_stage and self.request.device == "cuda" else 0
        return {
            "activations": self._kept_activations + again,
            "gradients": before + fresh + bucket,
            "dense_weight": self._layer_backward,
            "in_flight": self._in_flight,
        }

    @property
    def _layer_backward(self) -> int:
        """Backward of the largest layer: ∂y, ∂x, S, ∂W, ∂W ⊙ S, and what folding into the evidence needs."""
        n, w, la = self.request.micro_tokens, self.request.element, self.largest
        own = self.rows(la) * la.in_features
        fold = 4 * own if w < 4 else 0
        if self.request.evidence == "int8":
            whole_blocks = self.rows(la) * ceil(la.in_features / EVIDENCE_BLOCK) * EVIDENCE_BLOCK
            fold += 4 * (own + whole_blocks) + (4 * whole_blocks if whole_blocks > own else 0)
        return w * (n * (la.out_features + la.in_features) + 3 * la.weights) + fold

    @property
    def _in_flight(self) -> int:
        """Padded gradients on their way to their owners, and the rows that arrive; one rank sends none."""
        if self.request.ranks == 1:
            return 0
        sizes = sorted((self.rows(la) * la.in_features for la in self.binary), reverse=True)[: IN_FLIGHT + 1]
        return self.request.element * sum(size * (self.request.ranks + 1) for size in sizes)

    @property
    def best_scores(self) -> int:
        """Scores a rank offers at the peak rate: one more than the flips of each layer, up to its own rows."""
        return sum(min(int(self.request.flip_rate * la.weights) + 1, la.weights) for la in self.binary)

    @property
    def _flips(self) -> int:
        """Best scores (4 bytes, place 8, joined 4; of all ranks 4 each), one layer's scores; or the bits of all."""
        own = self.rows(self.largest) * self.largest.in_features
        scores = 9 * own + ceil(own / 2)
        shared = 4 * self.best_scores * (1 + self.request.ranks) if self.request.ranks > 1 else 4 * self.best_scores
        bits = 2 * self.bits + 2 * ceil(self.bits / self.request.ranks) if self.request.ranks > 1 else 0
        return 12 * self.best_scores + max(scores, shared, bits)

    @property
    def _update(self) -> int:
        """AdamW of the largest group: a float32 copy of its gradient, and two temporaries."""
        return 12 * self._shard(self.largest_real, 1)
