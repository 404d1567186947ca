"""Owns what of a training run lives on a rank all the time, in bytes: weights, evidence, optimizer, teacher.

Refuses to know the moments of a step (memory_plan.py); imports no torch. Rank 0 is counted, which owns the most rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil

from jobs.errors import BadPlan
from jobs.model_shape import Linear, ModelShape
from jobs.plan_request import PlanRequest
from jobs.tensor_sizes import EVIDENCE_BLOCK, PERSISTENT, PROBES, first_sign_bytes, groups_of


@dataclass(frozen=True)
class RankState:
    """One rank between two steps.

    Attributes:
        shape: the model.
        request: how it is trained.
    """

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
    def outside(self) -> int:
        """Elements of embedding and head."""
        return self.shape.embedding + self.shape.head

    @property
    def largest_group(self) -> int:
        """Elements of full-precision parameters that learn at one rate: embedding and head, or all scales."""
        return max(self.outside, self.scales)

    @property
    def persistent(self) -> int:
        """Elements of parameters that ZeRO-3 leaves whole: norms, biases, and the scales of small layers."""
        scales = (la.out_features * groups_of(la, self.request.group_size) for la in self.binary)
        return self.real - self.scales - self.outside + sum(size for size in scales if size <= PERSISTENT)

    @property
    def block(self) -> int:
        """Bytes of the linear layers of one decoder block as the model has them."""
        return ceil(self.request.element * sum(la.weights for la in self.shape.linears) / self.shape.blocks)

    def rows(self, layer: Linear) -> int:
        """⌈O/N⌉."""
        return ceil(layer.out_features / self.request.ranks)

    def shard(self, elements: int, from_stage: int) -> int:
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
    def first_signs(self) -> int:
        """Signs of the start, of the sampled rows owned here."""
        return sum(first_sign_bytes(la, self.rows(la)) for la in self.binary)

    @cached_property
    def parameters(self) -> int:
        """Full-precision parameters; under ZeRO-3 the rank's share, and small ones whole."""
        w, shared = self.request.element, self.request.zero_stage == 3 and self.request.ranks > 1
        return w * (self.shard(self.real, 3) + (self.persistent if shared else 0))

    @cached_property
    def optimizer(self) -> int:
        """AdamW's two moments, and the float32 master copy, which ZeRO makes also of float32 parameters."""
        master = 4 if self.request.zero_stage or self.request.element < 4 else 0
        return (8 + master) * self.shard(self.real, 1)

    @cached_property
    def teacher(self) -> int:
        """The teacher while it does not run."""
        w = self.request.element
        return {
            "resident": w * self.shape.parameters,
            "offloaded": w * self.outside,
            "sharded": w * ceil(self.shape.parameters / self.request.ranks),
            "cached": 0,
        }[self.request.teacher]

    @property
    def lasting(self) -> dict[str, int]:
        """All of it, by name."""
        return {
            "bits": self.bits + self.first_signs,
            "evidence": self.evidence,
            "moments": self.moments,
            "parameters": self.parameters,
            "optimizer": self.optimizer,
            "teacher": self.teacher,
        }

    @property
    def snapshot(self) -> int:
        """One rank's state, copied to the host's memory when a training checkpoint is written (training_state.py)."""
        vectors = 4 * sum(self.rows(la) + la.in_features for la in self.binary)
        real = 12 * ceil(self.real / self.request.ranks)
        return ceil(self.bits / self.request.ranks) + self.first_signs + self.evidence + vectors + real
