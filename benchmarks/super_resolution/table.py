"""Owns what is published: a row per method, scale and test set, and the claims.

The share of the gap closed, on PSNR: (ours − peer) / (full precision − peer). At each scale a method's figure is the
mean over seeds and the two test sets; the peer is the best of the binary methods of others that were run.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.record import Claim, claim
from benchmarks.super_resolution.methods import FULL, LABELS, OURS, PEERS
from benchmarks.super_resolution.runs import Chosen
from benchmarks.super_resolution.training import HELD_OUT, Scores

#: KBOP's published average over its tasks (OpenReview r16HwfP4HA, abstract).
BAR = ">= 0.3683"
Row = dict[str, Any]


def rows(chosen: Sequence[Chosen], bicubic: dict[int, Scores]) -> list[Row]:
    """Bicubic and every method, one row per test set."""
    found: list[Row] = []
    for scale, scores in bicubic.items():
        found += [_row("bicubic", scale, name, [value]) for name, value in scores.items() if name != HELD_OUT]
    for one in chosen:
        for method in one.results[0].scores:
            found += _method_rows(one, method)
    return found


def _method_rows(one: Chosen, method: str) -> list[Row]:
    sets = [name for name in one.results[0].scores[method] if name != HELD_OUT]
    return [
        _row(
            LABELS[method],
            one.scale,
            name,
            [result.scores[method][name] for result in one.results],
            rate=one.rate,
            state_bytes_per_weight=one.results[0].state_bytes,
            bits_per_weight=one.results[0].bits[method],
        )
        for name in sets
    ]


def _row(label: str, scale: int, name: str, values: list[float], **more: float) -> Row:
    """`psnr` and `std` (over seeds; empty for one) in dB."""
    about: Row = {"method": label, "scale": f"×{scale}", "set": name, "psnr": round(statistics.mean(values), 3)}
    about["std"] = round(statistics.stdev(values), 3) if len(values) > 1 else ""
    about["seeds"] = len(values)
    columns = ("rate", "state_bytes_per_weight", "bits_per_weight")
    return about | {column: more.get(column, "") for column in columns}


def average(one: Chosen, method: str) -> float:
    """Mean PSNR over seeds and test sets, dB."""
    scores = [result.scores[method] for result in one.results]
    return statistics.mean(value for s in scores for name, value in s.items() if name != HELD_OUT)


def gap_closed(ours: float, peer: float, full: float) -> float:
    """Share of the gap, any real number; above 1 ours is better than full precision, below 0 worse than the peer.

    Raises:
        ValueError: the peer is as good as full precision: there is no gap.
    """
    if peer >= full:
        raise ValueError(f"the best binary peer has {peer:.3f} dB, full precision {full:.3f}: no gap to close")
    return (ours - peer) / (full - peer)


def claims(chosen: Sequence[Chosen]) -> list[Claim]:
    """One per scale at which full precision, a peer and KBOP were run; without a gap it is 0 and says so."""
    found = []
    for scale in dict.fromkeys(one.scale for one in chosen):
        averages = {
            method: average(one, method) for one in chosen if one.scale == scale for method in one.results[0].scores
        }
        peers = [method for method in PEERS if method in averages]
        if not peers or not {OURS, FULL} <= averages.keys():
            continue
        best = max(peers, key=averages.__getitem__)
        name = f"gap closed at ×{scale}, best peer: {LABELS[best]}"
        if averages[best] >= averages[FULL]:  # too short a budget; 0 closes nothing, and the rows are still worth it
            found.append(claim(f"{name}, as good as full precision: no gap", 0.0, "share", BAR))
            continue
        share = gap_closed(averages[OURS], averages[best], averages[FULL])
        found.append(claim(name, share, "share", BAR))
    return found
