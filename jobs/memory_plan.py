"""Owns how many bytes a training rank holds, and when: the parts of the peak, from sizes alone.

Refuses to measure, and to know devices, time or money (plan.py); imports no torch, so that a server can use it.

A rank's memory is what lives all the time (bits, evidence, moments, full-precision parameters with their optimizer,
teacher) plus what lives in one moment of a step. The moments are walked in order and the largest sum is the peak:

    (division or targets of the teacher) → build → forward → teacher → loss → backward → flips → optimizer

Every formula counts tensors of the code it names. n = micro_batch · context, w = bytes of an element (4 on CPUs, 2 on
GPUs, bfloat16), N ranks, O·I weights in a layer, D hidden, F MLP, V vocabulary, P full-precision parameters:

| part | bytes on a rank | code |
|---|---|---|
| bits, first signs | Σ O·⌈I/8⌉, all rows on every rank; ⌈I/8⌉ of each sampled row owned | layers.py, reversals.py |
| evidence | 2 R·I, or R·(I + 4⌈I/64⌉); R = ⌈O/N⌉ rows | evidence.py |
| moments | 4 (R + I)(1 + PROBES) a layer while a step is under way, and the probes | moments.py |
| parameters | w P; ZeRO-3: w P/N, small ones whole, and what is gathered | engine.py |
| optimizer | AdamW 8 P, master copy 4 P; ZeRO ≥ 1: both /N | DeepSpeed |
| activations | see `activation_bytes`; with checkpointing w n D a block, and one block | recompute.py |
| loss | KL_LOGITS · w n V and KL_PIECES · 4 of at most KL_CHUNK numbers; of a cached teacher TOP_KL_… | distill.py |
| gradients in flight | one layer's, sent and received, 2 bytes each; or received, and one's own rows' sum | shard.py |
| flips | projections of all columns; or 8 bytes a candidate, and one layer's scores or a handful's digits | kbop.py |

tests/unit/jobs/test_memory_plan.py compares them with live tensors, `make bench-plan` with processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil

from jobs.model_shape import Linear
from jobs.rank_state import RankState
from jobs.tensor_sizes import (
    BITS_AT_ONCE,
    CACHE_TOP,
    CANDIDATE,
    EVIDENCE_AT_ONCE,
    EVIDENCE_BLOCK,
    HANDFUL,
    IN_FLIGHT,
    KL_CHUNK,
    KL_LOGITS,
    KL_PIECES,
    LIVE,
    PREFETCH,
    SELECTION,
    TARGET_BYTES,
    TARGET_COPIES,
    TARGET_LOGITS,
    TARGET_WINDOWS,
    TOP_KL_LOGITS,
    TOP_KL_PIECES,
    WIRE,
    ZERO_BUCKET,
    activation_bytes,
    cached_token_bytes,
    choosing_bytes,
    columns_bytes,
    final_norm_bytes,
    gathered_pieces,
    largest_handful,
)


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
class MemoryPlan(RankState):
    """The bytes of a rank in every moment of a run."""

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """Every moment, in order."""
        logits = self.request.element * self._vocabulary_rows
        between = {
            "activations": self._kept_activations,
            "gradients": self._gradients_between,
            "parameters": self.parameters + self._gathered,
            "in_flight": self._waiting,
        }
        dense = ceil(self.request.element * self.largest.weights + self.largest.weights / 2)
        return (
            *self.making,
            self._phase("forward", **between, dense_weight=dense, loss=logits),
            self._phase("teacher", **between, loss=logits, teacher_run=self._teacher_run),
            self._phase("loss", **between, loss=self._loss),
            self._phase("backward", **between | self._backward),
            self._phase("flips", gradients=self._gradients_at_step, flips=self._flips),
            self._phase("optimizer step", gradients=self._gradients_at_step, update=self._update),
        )

    @property
    def peak(self) -> Phase:
        """The moment with the most bytes."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def training_peak(self) -> Phase:
        """The same without the making of student and teacher."""
        return max(self.phases[len(self.making) :], key=lambda phase: phase.bytes)

    def _phase(self, name: str, **parts: int) -> Phase:
        return Phase(name, self.lasting | parts)

    @cached_property
    def making(self) -> tuple[Phase, ...]:
        """The moments in which the teacher is made ready and then the student, binary but for its last block.

        The targets of a cached teacher are counted with its blocks on disk: a job reads it whole only where that fits.
        """
        w, request = self.request.element, self.request
        outside = w * self.outside
        pages = outside if request.device == "cpu" else 0
        copies = (8 if w < 4 else 4) * self.largest.weights
        parts = {
            "student": w * (self.real - self.scales) + 4 * self.scales + self.bits,
            "teacher": self.teacher,
            "block": max(self.block + max(self._file_pages, copies), pages),
        }
        build = Phase("build", parts)
        if request.teacher == "cached":
            return self._targets(outside, max(self.block + self._file_pages, pages)), build
        if request.teacher == "sharded":
            divided = self.teacher - self.block // request.ranks
            last = max(divided + self.block + self._file_pages, pages)
            return Phase("division", {"teacher": outside, "block": last}), build
        return (build,)

    @property
    def targets_from_memory(self) -> Phase:
        """How the targets of a cached teacher are written where it fits whole, beside its embedding and head."""
        return self._targets(self.request.element * (self.outside + self.shape.parameters), 0)

    def _targets(self, teacher: int, block: int) -> Phase:
        """A teacher while its targets are written: inside a block, or where the likeliest tokens are found.

        Args:
            teacher: bytes of it that stay.
            block: bytes of its blocks that come and go.
        """
        context, vocabulary = self.request.context, self.shape.vocabulary
        tokens = context * min(TARGET_WINDOWS, max(1, TARGET_LOGITS // (vocabulary * context)))
        likeliest = tokens * (TARGET_COPIES * 4 * vocabulary + TARGET_BYTES * min(CACHE_TOP, vocabulary))
        on_host = TARGET_WINDOWS * context * cached_token_bytes(vocabulary) if self.request.device == "cpu" else 0
        run = max(block + self._inside_block(tokens), likeliest) + on_host
        return Phase("targets", {"teacher": teacher, "teacher_run": run})

    def _inside_block(self, tokens: int) -> int:
        """What a block of the teacher makes of so many tokens: its input, residual and norm, and the MLP's products."""
        return self.request.element * tokens * 3 * (self.shape.hidden + self.shape.ffn)

    @property
    def _file_pages(self) -> int:
        """A block that is read from its file is mapped until its copy is made."""
        return self.block if self.request.device == "cpu" else 0

    @property
    def _vocabulary_rows(self) -> int:
        """n·V."""
        return self.request.micro_tokens * self.shape.vocabulary

    @property
    def _gathered(self) -> int:
        """What ZeRO-3 has put together for use: as much as may live at once, or the largest tensor; what comes next."""
        if self.request.zero_stage < 3 or self.request.ranks == 1:
            return 0
        shared = self.real - self.persistent
        return self.request.element * min(shared, max(LIVE, self.shape.embedding, self.shape.head) + PREFETCH)

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
        """Full-precision gradients before a backward pass: of earlier micro-steps; ZeRO-3 always holds its share."""
        kept = self.request.micro_steps > 1 or self.request.zero_stage == 3
        return self.request.element * self.shard(self.real, 2) + self._own_bucket if kept else 0

    @property
    def _own_bucket(self) -> int:
        """ZeRO-3's bucket, which stays."""
        return self._bucket if self.request.zero_stage == 3 else 0

    @property
    def _bucket(self) -> int:
        """ZeRO's bucket of gradients: on a CPU what of it is touched, which in stages 1 and 2 are the gradients."""
        if self.request.device == "cuda":
            return self.request.element * ZERO_BUCKET if self.request.zero_stage else 0
        return self.request.element * min(ZERO_BUCKET, self.real) if self.request.zero_stage == 3 else 0

    @property
    def _gradients_at_step(self) -> int:
        """Full-precision gradients after the last backward pass: all of them under ZeRO 0 and 1, and the own part."""
        w = self.request.element
        others = w * (self.real - self.shard(self.real, 1)) if self.request.zero_stage == 1 else 0
        return others + w * self.shard(self.real, 1) + self._own_bucket

    @property
    def _teacher_run(self) -> int:
        """What the teacher's forward pass needs beyond what it holds: inside a block, or at its head."""
        w, request = self.request.element, self.request
        if request.teacher == "cached":
            return 0
        inside = self._inside_block(request.micro_tokens)
        at_head = w * self._vocabulary_rows
        if request.teacher == "offloaded":
            inside += self.block + self._file_pages
        if request.teacher == "sharded":
            inside += w * sum(min(most, self.shape.parameters) for most in (LIVE, PREFETCH))  # the latter twice
            at_head += w * self.shape.vocabulary * self.shape.hidden
        return max(inside, at_head)

    @property
    def _loss(self) -> int:
        logits, vocabulary = self.request.element * self._vocabulary_rows, self.shape.vocabulary
        piece = min(self._vocabulary_rows, max(1, KL_CHUNK // vocabulary) * vocabulary)
        if self.request.teacher == "cached":
            targets = TARGET_BYTES * min(CACHE_TOP, vocabulary) * self.request.micro_tokens
            before = self.request.element < 4 and piece < self._vocabulary_rows  # there while the next is converted
            return TOP_KL_LOGITS * logits + (TOP_KL_PIECES + before) * 4 * piece + targets
        return KL_LOGITS * logits + KL_PIECES * 4 * piece

    @property
    def _backward(self) -> dict[str, int]:
        """When the last block's layers meet: nothing of the activations is freed, the largest gradients exist."""
        again = self._block_activations if self.request.activation_checkpointing else 0
        w, head = self.request.element, self.shape.vocabulary * self.shape.hidden
        before = self._gradients_between
        fresh = 0 if before and self.request.zero_stage < 2 else w * head
        return {
            "activations": self._kept_activations + again,
            "gradients": before + fresh + self._bucket - self._own_bucket,
            "dense_weight": self._layer_backward,
            "in_flight": self._in_flight,
        }

    @property
    def _layer_backward(self) -> int:
        """Backward of the largest layer: ∂y, ∂x, S, ∂W and ∂W ⊙ S; one rank folds its gradient at once."""
        n, w, la = self.request.micro_tokens, self.request.element, self.largest
        fold = 0
        if self.request.ranks == 1:
            fold = self._adding(la) + (4 * la.weights if w < 4 else 0)
        return w * (n * (la.out_features + la.in_features) + 3 * la.weights) + fold

    def _adding(self, layer: Linear) -> int:
        """What it takes to add a float32 gradient to a layer's evidence: int8 is decoded some rows at a time."""
        rows, width = self.rows(layer), layer.in_features
        if self.request.evidence == "bfloat16":
            return 4 * rows * width if self.request.device == "cpu" else 0  # a CPU converts before it adds
        rows = min(rows, max(1, EVIDENCE_AT_ONCE // width))
        whole_blocks = rows * self._whole_blocks(layer)
        return 4 * (rows * width + whole_blocks) + (4 * whole_blocks if whole_blocks > rows * width else 0)

    def _whole_blocks(self, layer: Linear) -> int:
        """Columns of a layer, with more added so that blocks of int8 evidence are full."""
        return ceil(layer.in_features / EVIDENCE_BLOCK) * EVIDENCE_BLOCK

    @property
    def _in_flight(self) -> int:
        """One layer's gradient, sent and received; or the one before it, received and summed, while this one is there.

        Each leaves once the one before has been added to its evidence.
        """
        n = self.request.ranks
        if n == 1:
            return 0
        layers = sorted(self.binary, key=self._padded, reverse=True)[: IN_FLIGHT + 1]
        under_way = 2 * WIRE * self._padded(layers[0])
        if len(layers) <= IN_FLIGHT:
            return under_way
        before = layers[-1]
        own = self._padded(before) // n
        summing = 4 * own if self.request.device == "cpu" else 0
        return max(under_way, WIRE * self._padded(before) + 4 * own + max(summing, self._adding(before)))

    @property
    def _waiting(self) -> int:
        """The first layer's gradient, the last to leave, which waits for the next micro-step's backward pass."""
        several = self.request.ranks > 1 and self.request.micro_steps > 1
        return 2 * WIRE * self._padded(self.binary[0]) if several else 0

    def _padded(self, layer: Linear) -> int:
        """Weights of a layer with rows added so that every rank owns as many."""
        return self.rows(layer) * self.request.ranks * layer.in_features

    @property
    def candidates(self) -> int:
        """Scores a rank keeps at the peak rate."""
        return sum(self._candidates(la) for la in self.binary)

    def _candidates(self, layer: Linear) -> int:
        """Of one layer: one more than its flips on all ranks."""
        return int(self.request.flip_rate * layer.weights) + 1

    @property
    def _flips(self) -> int:
        """Columns' moments; then candidates with one layer's scores, a handful's digits, or the bits being gathered."""
        request = self.request
        moments = columns_bytes(sum(la.in_features for la in self.binary), request.ranks)
        scores = max(self._scoring(la) for la in self.binary)
        digits = SELECTION * largest_handful([self._candidates(la) for la in self.binary], HANDFUL)
        return max(moments, CANDIDATE * self.candidates + max(scores, digits, self._gathered_bits))

    def _scoring(self, layer: Linear) -> int:
        """One layer's signs and evidence in float32, which become its scores; then its candidates are found."""
        own = self.rows(layer) * layer.in_features
        spread = self.rows(layer) * self._whole_blocks(layer) if self.request.evidence == "int8" else 0
        return max(8 * own + 4 * spread, 4 * own + choosing_bytes(own, self._candidates(layer)))

    @property
    def _gathered_bits(self) -> int:
        """Bits of some layers: the own ones padded, those of all ranks, and put together."""
        n = self.request.ranks
        if n == 1:
            return 0
        sizes = [la.out_features * ceil(la.in_features / 8) for la in self.binary]
        largest = max(gathered_pieces(sizes, BITS_AT_ONCE))
        return 2 * largest + ceil(largest / n)

    @property
    def _update(self) -> int:
        """AdamW of the largest group: a float32 copy of its gradient, and two temporaries."""
        return 12 * self.shard(self.largest_group, 1)
