"""Owns finding the largest values of a tensor, and the k-th largest of values spread over ranks, exactly.

Refuses to know what is selected (kbop.py). Gathering every rank's candidates would take 4·N bytes a flip on each rank.
Instead the threshold is found digit by digit: the bits of non-negative float32 numbers are ordered as the numbers are,
so four histograms of one byte each, summed over ranks, name the value (radix selection, Knuth vol. 3, 5.2.5). That is
4 KiB a layer, whatever the number of ranks and flips, and bit by bit the value that sorting all of them gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kbop_core.shard import Gang

#: Values of a digit.
BASE = 256
#: Values that are looked at together: what that takes is 20 bytes for each.
HANDFUL = 2**22


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest values (zeros appended when there are fewer), and their places, int32 where that suffices.

    A sample gives a bound that about twice as many exceed, so that only those are sorted: the result is the same.

    Args:
        values: float32, one dimension.
        count: ≥ 1.
    """
    places = None
    if values.numel() > 65_536 and count * 16 < values.numel():
        sample = values[:: values.numel() // 16_384]
        bound = sample.topk(2 * math.ceil(count * sample.numel() / values.numel()) + 8).values[-1]
        places = (values > bound).nonzero().squeeze(1)
    if places is None or places.numel() < count:
        places = torch.arange(values.numel(), device=values.device)
    top = values[places].topk(min(count, places.numel()))
    missing = count - top.values.numel()
    found = torch.cat([top.values, top.values.new_zeros(missing)])
    places = places[top.indices].to(torch.int64 if values.numel() >= 2**31 else torch.int32)
    return found, torch.cat([places, places.new_zeros(missing)])


def kth_largest(values: Sequence[Tensor], ranks: Sequence[int], gang: Gang) -> list[float]:
    """For each layer the k-th largest of all ranks' values, negative ones counted as 0; 0 where there are fewer.

    Args:
        values: each layer's float32 values on this rank, one dimension; any superset of its k largest.
        ranks: k of each layer, ≥ 1, the same on every rank.
        gang: the ranks; four small all-reduces for all layers.
    """
    left = torch.tensor(list(ranks), device=values[0].device)
    found = torch.zeros_like(left)
    for shift in (24, 16, 8, 0):
        counts = torch.cat([_digits(values[part], found[part], shift) for part in _handfuls(values)])
        above = gang.sum(counts).long().flip(1).cumsum(1)
        passed = (above < left[:, None]).sum(1).clamp_max(BASE - 1)  # largest digits whose values all come before it
        left = left - torch.where(passed > 0, above.gather(1, (passed - 1).clamp_min(0)[:, None]).squeeze(1), 0)
        found = found * BASE + (BASE - 1 - passed)
    return [float(value) for value in found.int().view(torch.float32).tolist()]


def _handfuls(values: Sequence[Tensor]) -> Iterator[slice]:
    """Consecutive layers with at most `HANDFUL` values together, or one layer: what is looked at together."""
    start = held = 0
    for place, layer in enumerate(values):
        if held and held + layer.numel() > HANDFUL:
            yield slice(start, place)
            start, held = place, 0
        held += layer.numel()
    yield slice(start, len(values))


def _digits(values: Sequence[Tensor], found: Tensor, shift: int) -> Tensor:
    """How many values that begin with the digits found have which next digit, int32 (layers, BASE)."""
    lengths = torch.tensor([v.numel() for v in values], device=found.device)
    layer = torch.repeat_interleave(torch.arange(len(values), dtype=torch.int32, device=found.device), lengths)
    bits = torch.cat(list(values)).clamp_min_(0.0).add_(0.0).view(torch.int32)  # −0 becomes 0
    alike = bits >> (shift + 8) == found.int()[layer] if shift < 24 else slice(None)  # no digit is found yet
    digits = (bits[alike] >> shift) % BASE
    counts = torch.bincount(layer[alike] * BASE + digits, minlength=len(values) * BASE)
    return counts.int().view(len(values), BASE)
