"""KBOP: the flip rule and its optimizer. Everything that decides whether a weight changes its sign is in this file.

Refuses to know how gradients are computed (layers.py), who owns which rows (shard.py), how evidence is stored
(evidence.py), how second moments are measured (moments.py), how the k-th largest score of all ranks is found
(selection.py) or how scales learn (engine.py).

A weight is a sign s ∈ {±1} and has no latent value behind it. Its gradient at the binary point, g = ∂loss/∂s, says
what a flip would do: s → −s changes the loss by about −2 s·g (first order), so a flip helps where s·g > 0. One noisy
gradient is weak evidence; a running average is better. Layers, rows and columns have gradients of very different size
and curvature; dividing by powers of their second moments makes the averages comparable:

    m_ij ← β_t m_ij + (1 − β_t) g_ij                      evidence,  β_t = 1 − 1/(w₀ + c t)
    r_i  ← ρ r_i + (1 − ρ) mean_j g²_ij,   c_j ← ρ c_j + (1 − ρ) mean_i g²_ij
    u_ij = m_ij / (r_i c_j)^p
    flip (i, j) where  s_ij u_ij  is positive and among the k_t largest of the layer;  then m_ij ← −κ m_ij
    k_t  = ⌊N·H(t+1)⌋ − ⌊N·H(t)⌋,   H(t) = Σ_{τ<t} η_τ   (N weights in the layer)

η_t, the share of weights flipped in a step, is the flips' learning rate: warm-up, then cosine to 0. It is KBOP's
adaptive threshold with the multiple of the deviation chosen so that the share is exact. k_t carries fractions over, so
small layers and small rates flip too. Ties at the threshold do not flip; evidence of 0 never flips anything.

Why −κ m: mirrored, the evidence still speaks for a flip, a little less. Unless the next gradients confirm the new sign,
they soon take the flip back, as with a latent weight that has just crossed zero; from 0 that takes as long as the
average is. Flips become cheap trials, and shares several times larger pay (docs/quality.md).

Why p = ¾: the second-order change of a flip, −2 s g + 2 h, is negative where s g > h, so a weight of large curvature h
needs more evidence. √(r c) is the size of the noise, r c estimates the curvature; the exponent between them is best
(docs/quality.md). Why the average grows longer: what limits a long run is noise, not age of the evidence.

Convergence. Let the loss be L-smooth in the signs and its gradient bounded, in all N weights together. k flips change
it by at most −2 Σ s g + 2 L k; with H bounded and η_t → 0 the flips of a step stop overshooting, β_t → 1 drives the
noise of m to 0: the run ends near a point where no single flip gains more than 2 L, but for the last trials. On convex
quadratics whose optimum is known the rule ends there, or less than 1 % of the signs away
(tests/unit/core/test_kbop_converges.py; where it does not: docs/quality.md).

| symbol | here | unit |
|---|---|---|
| g | argument of the gradient sink, (O, I) | loss |
| m | `_Shard.evidence` × `KBOP.unit` | loss |
| r, c | `Moments.row`, `Moments.column` | loss² |
| u | `evidence_scores`, float32 | only its order within a layer matters |
| η | `FlipSchedule.peak` | share of a layer's weights per step, 0 … 0.5 |
| w₀, c | `MomentumSchedule` (schedules.py) | steps; 1 |
| ρ, p, κ | `MOMENT_DECAY` (moments.py), `POWER`, `MIRROR` | 1 |

Sources: one average, a threshold adapted to the layer and a learning rate for the flips are KBOP's (OpenReview
r16HwfP4HA, abstract and reviews); the rest is ours, each choice with its row in docs/quality.md (`make bench-quality`).
With gradients that sum exactly, 1, 2 or 3 ranks flip the same weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from kbop_core.bits import unpack_signs
from kbop_core.errors import BadCheckpoint, GradientContract, NonFiniteGradient
from kbop_core.evidence import Evidence, EvidenceKind, make_evidence
from kbop_core.layers import BinaryLayer
from kbop_core.moments import Moments, mean_squares, random_signs
from kbop_core.reversals import Reversals
from kbop_core.schedules import FlipSchedule, MomentumSchedule
from kbop_core.selection import kth_largest, largest
from kbop_core.shard import Gang
from kbop_core.slices import Slice, SliceReader

#: p: power of the second moments in the score (docs/quality.md).
POWER = 0.75
#: κ: what a flip leaves of its evidence, mirrored to the side of the old sign, 0 … 1 (docs/quality.md).
MIRROR = 0.8
#: Bytes of bits that are gathered at a time, about.
BITS_AT_ONCE = 2**24
#: What the names of KBOP's tensors in a checkpoint begin with.
STATE_PREFIXES = ("bits.", "evidence.", "row.", "column.", "first_signs.")
#: Once Π β is below this, the stored evidence is multiplied by it: a power of two, so nothing is rounded.
LEAST_UNIT = 2.0**-24

# -- the rule ---------------------------------------------------------------------------------------------------------


def evidence_scores(signs_RI: Tensor, evidence_RI: Tensor, row_R: Tensor, column_I: Tensor) -> Tensor:
    """s·u: how much the evidence, normalised by row and column, wants each sign to flip.

    Args:
        signs_RI: ±1, float32, overwritten and returned.
        evidence_RI: m, up to a positive factor of the whole layer.
        row_R: r, mean square of the gradient over each row, float32, ≥ 0.
        column_I: c, mean square of the gradient over each column (all ranks), float32, ≥ 0.

    Returns:
        float32 (R, I); 0 where the evidence is 0, also in rows and columns that never had a gradient.
    """
    top = column_I.max()  # of all ranks: their scores are compared with each other
    signs_RI *= evidence_RI
    signs_RI *= _inverse_power(row_R, top)[:, None]
    signs_RI *= _inverse_power(column_I, top)
    return signs_RI


def _inverse_power(moment: Tensor, top: Tensor) -> Tensor:
    """(moment/top)^−p in float64, so that no unit of the loss under- or overflows; 0 where the moment is 0."""
    relative = moment.double() / top.double()
    return torch.where(moment > 0, relative.pow(-POWER), 0.0).float()


# -- the optimizer ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlipStats:
    """What one step did on all ranks.

    Attributes:
        flips: signs flipped per layer.
        reversals: those that gave back a sign of the start, per layer; estimated on a sample of rows (reversals.py).
        weights: binary weights of all layers.
    """

    flips: Mapping[str, int]
    reversals: Mapping[str, int]
    weights: int

    @property
    def rate(self) -> float:
        """Share of all binary weights flipped in this step."""
        return sum(self.flips.values()) / max(1, self.weights)


@dataclass
class _Shard:
    """This rank's rows of one layer, their evidence, and the layer's second moments."""

    layer: BinaryLayer
    rows: slice
    evidence: Evidence  # S = m / unit, (R, I)
    moments: Moments
    reversals: Reversals
    arrived: int = 0  # micro-steps folded since the last step

    @classmethod
    def empty(cls, layer: BinaryLayer, rows: slice, kind: EvidenceKind) -> _Shard:
        count, height, width, device = (
            rows.stop - rows.start,
            layer.out_features,
            layer.in_features,
            layer.weight.device,
        )
        evidence = make_evidence(kind, count, width, device)
        reversals = Reversals(layer.weight[rows], rows.start, height)
        return cls(layer, rows, evidence, Moments(rows, width, height, device), reversals)

    @property
    def bits(self) -> Tensor:
        return self.layer.weight[self.rows]

    def slices(self) -> dict[str, Slice]:
        """What lives between two steps besides the bits, aliased."""
        start, total = self.rows.start, self.layer.out_features
        own = {f"evidence.{part}": tensor for part, tensor in self.evidence.tensors().items()} | {
            "row": self.moments.row
        }
        return {part: Slice(tensor, start, total) for part, tensor in own.items()} | {
            "column": Slice.whole(self.moments.column),
            "first_signs": Slice(self.reversals.start, self.reversals.before, self.reversals.total),
        }


class KBOP:
    """Flips the signs of binary layers; holds their evidence, sharded by rows, and nothing else.

    Use: build it (it installs itself as each layer's gradient sink), run `micro_steps` backward passes, call `step`.
    Scales, norms and embeddings have an optimizer of their own.

    Args:
        layers: name → layer; every rank gives the same ones in the same order.
        schedule: η over time.
        momentum: β over time; a number keeps it constant, 0 ≤ β ≤ MOST_MOMENTUM.
        micro_steps: backward passes between two steps. Each layer must see exactly this many.
        gang: the ranks; the gradients of all are summed and divided by their number.
        evidence: how m is stored: "bfloat16" (2 bytes a weight) or "int8" (1.06).
        in_flight: reduce-scatters allowed to overlap with the rest of backward.
    """

    def __init__(
        self,
        layers: Mapping[str, BinaryLayer],
        schedule: FlipSchedule,
        momentum: MomentumSchedule | float | None = None,
        micro_steps: int = 1,
        gang: Gang | None = None,
        evidence: EvidenceKind = "bfloat16",
        in_flight: int = 1,
    ) -> None:
        if isinstance(momentum, int | float):
            momentum = MomentumSchedule.constant(momentum)
        self.schedule, self.momentum, self.micro_steps = schedule, momentum or MomentumSchedule(), micro_steps
        self.gang, self.in_flight, self.steps_done = gang or Gang(), in_flight, 0
        self.unit = 1.0  # f = Π β since the evidence was last rescaled
        self._pending: deque[tuple[_Shard, Callable[[], Tensor]]] = deque()
        self.shards: dict[str, _Shard] = {}
        for name, layer in layers.items():
            self.shards[name] = _Shard.empty(layer, self.gang.rows(layer.out_features), evidence)
            layer.gradient_sink = partial(self._receive, self.shards[name])
        self._probes = random_signs(max(max(la.in_features, la.out_features) for la in layers.values()))
        self._probes = self._probes.to(next(iter(layers.values())).weight.device)
        self._decay()

    # -- gradients in ---------------------------------------------------------------------------------------------

    def _decay(self) -> None:
        """m ← β m for the coming step, by its unit."""
        beta = self.momentum.beta(self.steps_done)
        self.unit *= beta
        if self.unit < LEAST_UNIT:
            lasting = beta >= LEAST_UNIT  # a smaller β leaves nothing of the evidence, and its unit would vanish
            factor = LEAST_UNIT if lasting else 0.0
            for shard in self.shards.values():
                shard.evidence.multiply(factor)
            self.unit = self.unit / LEAST_UNIT if lasting else 1.0

    def _receive(self, shard: _Shard, grad_OI: Tensor) -> None:
        """Gradient sink of one layer: fold an earlier one that has had time to arrive, then start this one's way."""
        while self._pending and len(self._pending) >= self.in_flight:
            self._fold(*self._pending.popleft())
        self._pending.append((shard, self.gang.reduce_scatter_rows(grad_OI)))
        if self.in_flight == 0 or self.gang.size == 1:
            self._fold(*self._pending.popleft())

    def _fold(self, shard: _Shard, arrive: Callable[[], Tensor]) -> None:
        """m ← m + (1 − β) g and the projections of g, over the micro-steps of a step, without a buffer for g."""
        gradient = arrive().float()
        shard.moments.project(gradient, self._probes)
        shard.evidence.add(gradient, (1.0 - self.momentum.beta(self.steps_done)) / self.gang.size / self.unit)
        shard.arrived += 1

    # -- flips out ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> FlipStats:
        """Flip, on every rank the same signs. No sign changes when a gradient was not finite.

        The evidence has taken that gradient in already, so the run goes on from its last checkpoint, not from memory.

        Raises:
            GradientContract: a layer's gradient did not arrive `micro_steps` times since the last step.
            NonFiniteGradient: NaN or infinity in any layer on any rank.
        """
        while self._pending:
            self._fold(*self._pending.popleft())
        self._check_arrivals()
        self._take_moments()
        counts = [self.schedule.count(self.steps_done, s.layer.signs_count) for s in self.shards.values()]
        best = [largest(_scores(shard), count + 1) for shard, count in zip(self.shards.values(), counts, strict=True)]
        thresholds = kth_largest([values for values, _ in best], [count + 1 for count in counts], self.gang)
        counted = []
        for shard, (values, places), threshold in zip(self.shards.values(), best, thresholds, strict=True):
            counted.append(_flip(shard, places[values > threshold]))
            shard.arrived = 0
        self.steps_done += 1
        self._decay()
        self._share_bits()
        return self._stats(self.gang.sum(torch.stack(counted)))

    def _check_arrivals(self) -> None:
        wrong = {name: s.arrived for name, s in self.shards.items() if s.arrived != self.micro_steps}
        if wrong:
            name, seen = next(iter(wrong.items()))
            raise GradientContract(
                f"layer {name} saw {seen} gradients in this step, not {self.micro_steps} ({len(wrong)} layers differ)",
                "every binary layer must be used exactly once in each forward pass; keep others with `keep`",
            )

    def _take_moments(self) -> None:
        """Fold this step's projections into r and c, exact over shards.

        The columns' projections are summed like a layer's gradient, each rank squares its part of the columns, and all
        get the result: 4·PROBES + 4 bytes a column on the wire, and a mark where something was not finite. Not in
        bfloat16: then one rank, which rounds nothing, would not flip what several do.
        """
        sketches = torch.cat([s.moments.column_sketch.t() for s in self.shards.values()])
        heights = torch.cat([torch.full_like(s.moments.column, s.layer.out_features) for s in self.shards.values()])
        over = heights[self.gang.rows(len(heights))].double() * self.gang.size**2
        squares = mean_squares(replace(self.gang, wire=torch.float32).reduce_scatter_rows(sketches)(), over)
        (whole,) = self.gang.gather_rows([squares], [len(sketches)])
        columns = whole.split([s.layer.in_features for s in self.shards.values()])
        if not bool(whole.isfinite().all()):
            self._raise_non_finite(columns)
        for shard, squares in zip(self.shards.values(), columns, strict=True):
            shard.moments.update(squares, self.gang.size, self.steps_done)

    def _raise_non_finite(self, columns: tuple[Tensor, ...]) -> None:
        names = [n for n, c in zip(self.shards, columns, strict=True) if not bool(c.isfinite().all())]
        raise NonFiniteGradient(
            f"non-finite gradient in {len(names)} of {len(columns)} layers, first {names[0]}, "
            f"at step {self.steps_done}; no sign was flipped in this step",
            "resume from the last checkpoint with smaller learning rates, or look for NaN in the data's loss",
        )

    def _share_bits(self) -> None:
        """All-gather of packed bits, a few layers at a time: a gathered copy of all would be as large as they are."""
        if self.gang.size == 1:
            return
        waiting, held, shards = list[_Shard](), 0, list(self.shards.values())
        for shard in shards:
            waiting.append(shard)
            held += shard.layer.weight.nbytes
            if held < BITS_AT_ONCE and shard is not shards[-1]:
                continue
            whole = self.gang.gather_rows([s.bits for s in waiting], [s.layer.out_features for s in waiting])
            for one, bits in zip(waiting, whole, strict=True):
                one.layer.weight.copy_(bits)
            del whole, bits  # before the next ones come
            waiting, held = [], 0

    def _stats(self, counted: Tensor) -> FlipStats:
        """From each layer's flips, flips in sampled rows and reversals among those: int64 (layers, 3), all ranks."""
        flips, reversals = {}, {}
        for name, (count, sampled, back) in zip(self.shards, counted.tolist(), strict=True):
            flips[name], reversals[name] = count, round(count * back / max(1, sampled))
        return FlipStats(flips, reversals, sum(s.layer.signs_count for s in self.shards.values()))

    # -- state ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Slice]:
        """This rank's rows of everything that lives between two steps, aliased; `steps_done` and `unit` are apart."""
        slices = {f"bits.{n}": Slice(s.bits, s.rows.start, s.layer.out_features) for n, s in self.shards.items()}
        return slices | {f"{part}.{n}": piece for n, s in self.shards.items() for part, piece in s.slices().items()}

    @torch.no_grad()
    def load(self, saved: SliceReader, steps_done: int, unit: float) -> None:
        """Take what any number of ranks saved; every rank calls it.

        Raises:
            BadCheckpoint: other layers, or another kind of evidence.
        """
        held = self.state()
        stored = {name for name in saved.names if name.startswith(STATE_PREFIXES)}
        other = stored ^ held.keys() or {n for n in held if saved.total(n) != held[n].total}
        if other:
            raise BadCheckpoint(
                f"saved for other layers or with another kind of evidence: {min(other)} differs",
                "resume with the model, layers and `evidence` that the run began with",
            )
        self.steps_done, self.unit = steps_done, unit
        for name, piece in held.items():
            piece.rows.copy_(saved.read(name, piece.start, piece.start + piece.rows.shape[0]))
        for name, shard in self.shards.items():
            shard.layer.weight.copy_(saved.read_whole(f"bits.{name}"))
            shard.moments.forget()
            shard.arrived = 0
        self._pending.clear()

    def state_bytes(self) -> int:
        """Bytes that live between two steps on this rank because of the binary weights: bits, evidence, moments."""
        shards = self.shards.values()
        return sum(s.layer.weight.nbytes + sum(p.rows.nbytes for p in s.slices().values()) for s in shards)


def _scores(shard: _Shard) -> Tensor:
    signs = unpack_signs(shard.bits, shard.layer.in_features)
    return evidence_scores(signs, shard.evidence.values(), shard.moments.row, shard.moments.column).view(-1)


def _flip(shard: _Shard, places: Tensor) -> Tensor:
    """Flip the signs at flat places of the shard and mirror their evidence: what comes next may take a flip back.

    Returns:
        int64 (3,): flips, those in sampled rows, and reversals among these.
    """
    places = places.long()
    shard.evidence.multiply_at(places, -MIRROR)
    row, column = places // shard.layer.in_features, places % shard.layer.in_features
    counted = torch.cat([places.new_tensor([places.numel()]), shard.reversals.count(shard.bits, row, column)])
    width = shard.layer.weight.shape[1]
    change = torch.zeros(shard.bits.numel(), dtype=torch.uint8, device=places.device)
    bit = torch.bitwise_left_shift(torch.ones_like(column), column % 8).to(torch.uint8)
    change.index_add_(0, row * width + column // 8, bit)  # distinct bits: the sum is their union
    shard.bits.bitwise_xor_(change.view(-1, width))
    return counted
