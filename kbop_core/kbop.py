"""KBOP: the flip rule and its optimizer. Everything that decides whether a weight changes its sign is in this file.

Refuses to know how gradients are computed (layers.py), who owns which rows (shard.py) or how scales learn (engine.py).

A weight is a sign s ∈ {±1} and has no latent value behind it. Its gradient at the binary point, g = ∂loss/∂s, says
what a flip would do: s → −s changes the loss by about −2 s·g (first order), so a flip helps where s·g > 0. One noisy
gradient is weak evidence; an exponential moving average is better. Layers, rows and columns have gradients of very
different size; dividing by the root mean squares of row and column makes them comparable:

    m_ij ← β m_ij + (1 − β) g_ij                         evidence (the only state: two bytes a weight)
    u_ij = m_ij / √(r_i c_j),  r_i = mean_j m²_ij,  c_j = mean_i m²_ij
    flip (i, j) where  s_ij u_ij  is positive and among the k_t largest of the layer;  then m_ij ← 0 there
    k_t  = ⌊N·H(t+1)⌋ − ⌊N·H(t)⌋,   H(t) = Σ_{τ<t} η_τ   (N weights in the layer)

η_t, the share of weights flipped in a step, is the flips' learning rate: warm-up, then cosine to 0. It is KBOP's
adaptive threshold with the multiple of the deviation chosen so that the share is exact. k_t carries fractions over, so
small layers and small rates flip too. Ties at the threshold do not flip; a zero gradient never flips anything.

| symbol | here | unit |
|---|---|---|
| g | argument of the gradient sink, (O, I) | loss |
| m | `_Shard.evidence`, bfloat16, (R, I) | loss |
| u | `evidence_scores`, float32 | 1/loss: only its order within a layer matters |
| η | `FlipSchedule.peak` | share of a layer's weights per step, 0 … 0.5 |
| β | `KBOP(momentum=…)` | 1, 0 ≤ β ≤ 0.995 |

Sources: one average, a threshold adapted to the layer and a learning rate for the flips are KBOP's (OpenReview
r16HwfP4HA, abstract and reviews); row × column normalisation, the exact share and the reset are ours. r and c are
those of the evidence itself, not of the gradient: no further state to keep or to shard (docs/quality.md).

World-size independence: a bfloat16 has 8 significant bits, its square 16, so the float64 sums behind r and c are exact
in any order while |m| in a row or column spans less than 2^12 (beyond: they differ in the 16th digit, of which the
float32 score keeps 7). With gradients that sum exactly, 1, 2 or 3 ranks flip the same weights.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from kbop_core.bits import unpack_signs
from kbop_core.errors import GradientContract, NonFiniteGradient
from kbop_core.layers import BinaryLinear
from kbop_core.shard import Gang

#: Largest β: from 0.997 on a bfloat16 times β rounds back to itself, and evidence would never decay.
MOST_MOMENTUM = 0.995

# --------------------------------------------------------------------------------------------------------------------
# The rule
# --------------------------------------------------------------------------------------------------------------------


def evidence_scores(signs_RI: Tensor, evidence_RI: Tensor, row_R: Tensor, column_I: Tensor) -> Tensor:
    """s·u: how much the evidence, normalised by row and column, wants each sign to flip.

    Args:
        signs_RI: ±1, float32, overwritten and returned.
        evidence_RI: m, any floating dtype.
        row_R: r, mean square of m over each row's columns, float64, ≥ 0.
        column_I: c, mean square of m over each column's rows (all ranks), float64, ≥ 0.

    Returns:
        float32 (R, I), unit 1/loss; 0 where the evidence is 0, also in all-zero rows and columns.
    """
    tiny = torch.finfo(torch.float32).tiny
    signs_RI *= evidence_RI
    signs_RI *= (row_R + tiny).rsqrt().float()[:, None]
    signs_RI *= (column_I + tiny).rsqrt().float()
    return signs_RI


def flip_threshold(scores: Tensor, count: int) -> float:
    """The score that a flip must exceed so that at most `count` flip: the (count+1)-th largest, at least 0.

    Args:
        scores: one dimension; any superset of the layer's count+1 largest.
        count: k_t ≥ 0.
    """
    if count >= scores.numel():
        return 0.0
    return max(0.0, float(scores.topk(count + 1).values[-1]))


@dataclass(frozen=True)
class FlipSchedule:
    """The flips' learning rate over time: linear warm-up, then cosine to zero.

    Attributes:
        peak: η, largest share of a layer's weights flipped in one step, 0 … 0.5.
        steps: length of the run.
        warmup: steps of the linear rise.
    """

    peak: float
    steps: int
    warmup: int

    def __post_init__(self) -> None:
        if not 0.0 <= self.peak <= 0.5:
            raise ValueError(f"flip_rate is {self.peak}; it is a share of the weights per step, 0 … 0.5")

    def share(self, step: int) -> float:
        """η at a step, 0 ≤ step; 0 beyond the end."""
        return self.peak * warmup_cosine(step, self.steps, self.warmup)

    @cached_property
    def _spent(self) -> tuple[float, ...]:
        """H(0) … H(steps)."""
        return tuple(accumulate((self.share(t) for t in range(self.steps)), initial=0.0))

    def count(self, step: int, weights: int) -> int:
        """k_t: flips allowed in a layer of `weights` weights; fractions are carried from step to step."""
        if step >= self.steps:
            return 0
        return math.floor(weights * self._spent[step + 1]) - math.floor(weights * self._spent[step])


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Factor in (0, 1]: linear over the first `warmup` steps, then cosine to 0 at `steps`."""
    if step >= steps:
        return 0.0
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup + 1) / max(1, steps - warmup + 1)))


# --------------------------------------------------------------------------------------------------------------------
# The optimizer
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlipStats:
    """What one step did: signs flipped of all ranks, per layer and in all."""

    flips: Mapping[str, int]
    weights: int

    @property
    def rate(self) -> float:
        """Share of all binary weights flipped in this step."""
        return sum(self.flips.values()) / max(1, self.weights)


@dataclass
class _Shard:
    """This rank's rows of one layer and their evidence."""

    layer: BinaryLinear
    rows: slice
    evidence: Tensor  # m, (R, I), bfloat16
    arrived: int = 0  # micro-steps folded since the last step

    @property
    def bits(self) -> Tensor:
        return self.layer.weight[self.rows]


class KBOP:
    """Flips the signs of binary layers; holds their evidence, sharded by rows, and nothing else.

    Use: build it (it installs itself as each layer's gradient sink), run `micro_steps` backward passes, call `step`.
    Not for scales, norms or embeddings: those are real numbers and have an optimizer of their own.

    Args:
        layers: name → layer; every rank gives the same ones in the same order.
        schedule: η over time.
        momentum: β, 0 ≤ β ≤ 0.995. The default is explained in docs/quality.md.
        micro_steps: backward passes between two steps. Each layer must see exactly this many.
        gang: the ranks; the gradients of all are summed and divided by their number.
        in_flight: reduce-scatters allowed to overlap with the rest of backward.
    """

    def __init__(
        self,
        layers: Mapping[str, BinaryLinear],
        schedule: FlipSchedule,
        momentum: float = 0.98,
        micro_steps: int = 1,
        gang: Gang | None = None,
        in_flight: int = 2,
    ) -> None:
        if not 0.0 <= momentum <= MOST_MOMENTUM:
            raise ValueError(f"momentum is {momentum}; legal: 0 ≤ momentum ≤ {MOST_MOMENTUM}")
        self.schedule, self.momentum, self.micro_steps = schedule, momentum, micro_steps
        self.gang, self.in_flight, self.steps_done = gang or Gang(), in_flight, 0
        self._pending: deque[tuple[_Shard, Callable[[], Tensor]]] = deque()
        self.shards: dict[str, _Shard] = {}
        for name, layer in layers.items():
            rows = self.gang.rows(layer.out_features)
            shape = (rows.stop - rows.start, layer.in_features)
            evidence = torch.zeros(shape, dtype=torch.bfloat16, device=layer.weight.device)
            self.shards[name] = _Shard(layer, rows, evidence)
            layer.gradient_sink = partial(self._receive, self.shards[name])

    # -- gradients in ---------------------------------------------------------------------------------------------

    def _receive(self, shard: _Shard, grad_OI: Tensor) -> None:
        """Gradient sink of one layer: start its reduce-scatter, fold an earlier one that has had time to arrive."""
        self._pending.append((shard, self.gang.reduce_scatter_rows(grad_OI)))
        if len(self._pending) > self.in_flight or self.gang.size == 1:
            self._fold(*self._pending.popleft())

    def _fold(self, shard: _Shard, arrive: Callable[[], Tensor]) -> None:
        """m ← β m + (1 − β) g over the micro-steps of a step, without a buffer for g."""
        gradient = arrive()
        decay = self.momentum if shard.arrived == 0 else 1.0
        gain = (1.0 - self.momentum) / self.gang.size
        shard.evidence.copy_(gradient.float().mul_(gain).add_(shard.evidence, alpha=decay))
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
        moments = self._moments()
        counts = [self.schedule.count(self.steps_done, s.layer.signs_count) for s in self.shards.values()]
        best = [
            _largest(_scores(shard, *moment), count)
            for shard, moment, count in zip(self.shards.values(), moments, counts, strict=True)
        ]
        thresholds = self._thresholds([values for values, _ in best], counts)
        for shard, (values, places), threshold in zip(self.shards.values(), best, thresholds, strict=True):
            _flip(shard, places[values > threshold])
            shard.arrived = 0
        self.steps_done += 1
        return self._share_bits(torch.tensor([int((v > t).sum()) for (v, _), t in zip(best, thresholds, strict=True)]))

    def _check_arrivals(self) -> None:
        wrong = {name: s.arrived for name, s in self.shards.items() if s.arrived != self.micro_steps}
        if wrong:
            name, seen = next(iter(wrong.items()))
            raise GradientContract(
                f"layer {name} saw {seen} gradients in this step, not {self.micro_steps} ({len(wrong)} layers differ)",
                "every binary layer must be used exactly once in each forward pass; keep others with `keep`",
            )

    def _moments(self) -> list[tuple[Tensor, Tensor]]:
        """(r, c) of every layer, exact over shards: one all-reduce for all columns of all layers."""
        rows, columns = [], []
        for shard in self.shards.values():
            squares = shard.evidence.float().square_()
            rows.append(squares.sum(1, dtype=torch.float64) / shard.layer.in_features)
            columns.append(squares.sum(0, dtype=torch.float64))
        summed = self.gang.sum(torch.cat(columns))
        if not bool(summed.isfinite().all()):
            self._raise_non_finite(summed.split([c.numel() for c in columns]))
        parts = summed.split([c.numel() for c in columns])
        totals = [shard.layer.out_features for shard in self.shards.values()]
        return [(r, c / total) for r, c, total in zip(rows, parts, totals, strict=True)]

    def _raise_non_finite(self, columns: tuple[Tensor, ...]) -> None:
        names = [n for n, c in zip(self.shards, columns, strict=True) if not bool(c.isfinite().all())]
        raise NonFiniteGradient(
            f"non-finite gradient in {len(names)} of {len(columns)} layers, first {names[0]}, "
            f"at step {self.steps_done}; no sign was flipped in this step",
            "resume from the last checkpoint with smaller learning rates, or look for NaN in the data's loss",
        )

    def _thresholds(self, values: list[Tensor], counts: list[int]) -> list[float]:
        """Each layer's flip threshold from every rank's best scores: one all-gather."""
        gathered = [g.split([v.numel() for v in values]) for g in self.gang.all_gather(torch.cat(values))]
        layers = zip(*gathered, strict=True)
        return [flip_threshold(torch.cat(parts), count) for parts, count in zip(layers, counts, strict=True)]

    def _share_bits(self, flips: Tensor) -> FlipStats:
        """All-gather of packed bits, and the number of flips of all ranks."""
        layers = [s.layer for s in self.shards.values()]
        if self.gang.size > 1:
            whole = self.gang.gather_rows([s.bits for s in self.shards.values()], [la.out_features for la in layers])
            for layer, bits in zip(layers, whole, strict=True):
                layer.weight.copy_(bits)
        total = self.gang.sum(flips.to(layers[0].weight.device)).tolist()
        return FlipStats(dict(zip(self.shards, total, strict=True)), sum(la.signs_count for la in layers))

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This rank's rows: evidence (aliased) and bits (copied), and the step."""
        return {
            "steps_done": self.steps_done,
            "rows": {name: (s.rows.start, s.rows.stop) for name, s in self.shards.items()},
            "evidence": {name: s.evidence for name, s in self.shards.items()},
            "bits": {name: s.bits.clone() for name, s in self.shards.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state that the same rank of the same number of ranks saved; every rank calls it.

        Raises:
            ValueError: other layers or other rows.
        """
        rows = {name: (s.rows.start, s.rows.stop) for name, s in self.shards.items()}
        if rows != state["rows"]:
            raise ValueError(
                f"saved for other layers or another number of ranks: this is {self.gang.rank} of {self.gang.size}"
            )
        self.steps_done = int(state["steps_done"])
        for name, shard in self.shards.items():
            shard.evidence.copy_(state["evidence"][name])
            shard.bits.copy_(state["bits"][name])
            shard.arrived = 0
        self._pending.clear()
        self._share_bits(torch.zeros(len(self.shards), dtype=torch.int64))

    def state_bytes(self) -> int:
        """Bytes that live between two steps on this rank because of the binary weights: bits and evidence."""
        return sum(s.layer.weight.nbytes + s.evidence.nbytes for s in self.shards.values())


def _scores(shard: _Shard, row_R: Tensor, column_I: Tensor) -> Tensor:
    signs = unpack_signs(shard.bits, shard.layer.in_features)
    return evidence_scores(signs, shard.evidence, row_R, column_I).view(-1)


def _largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The count+1 largest scores (zeros appended when there are fewer) and their places.

    A sample gives a bound that about twice as many exceed, so that only those are sorted; the result does not depend
    on it.
    """
    wanted = count + 1
    places = None
    if scores.numel() > 65_536 and wanted * 16 < scores.numel():
        sample = scores[:: scores.numel() // 16_384]
        bound = sample.topk(2 * math.ceil(wanted * sample.numel() / scores.numel()) + 8).values[-1]
        places = (scores > bound).nonzero().squeeze(1)
    if places is None or places.numel() < wanted:
        places = torch.arange(scores.numel(), device=scores.device)
    top = scores[places].topk(min(wanted, places.numel()))
    missing = wanted - top.values.numel()
    values = torch.cat([top.values, top.values.new_zeros(missing)])
    return values, torch.cat([places[top.indices], places.new_zeros(missing)])


def _flip(shard: _Shard, places: Tensor) -> None:
    """Flip the signs at flat places of the shard and forget their evidence: they start anew from the other side."""
    shard.evidence.view(-1)[places] = 0
    row, column = places // shard.layer.in_features, places % shard.layer.in_features
    width = shard.layer.weight.shape[1]
    change = torch.zeros(shard.bits.numel(), dtype=torch.uint8, device=places.device)
    bit = torch.bitwise_left_shift(torch.ones_like(column), column % 8).to(torch.uint8)
    change.index_add_(0, row * width + column // 8, bit)  # distinct bits: the sum is their union
    shard.bits.bitwise_xor_(change.view(-1, width))
