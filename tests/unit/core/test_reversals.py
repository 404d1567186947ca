"""Reversals against a plain count: how many flips give a weight back its first sign."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kbop_core.bits import pack_signs
from kbop_core.reversals import SAMPLE, Reversals
from kbop_core.schedules import FlipSchedule
from kbop_core.shard import Gang
from kbop_core.slices import SliceReader, write_slices


def stride(height: int) -> int:
    return max(1, height // SAMPLE)


def random_signs(height: int, width: int, seed: int) -> Tensor:
    return torch.randn(height, width, generator=torch.Generator().manual_seed(seed)).sign()


def counted(height: int, width: int, ranks: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """(counts of all ranks together, counts of a plain reference) of four steps of random flips."""
    first = random_signs(height, width, seed)
    rows = [Gang(rank, ranks).rows(height) for rank in range(ranks)]
    shards = [Reversals(pack_signs(first)[own], own.start, height) for own in rows]
    signs, rounds = first.clone(), []
    for step in range(1, 5):
        flips = random_signs(height, width, seed + step) > 0
        found = torch.zeros(2, dtype=torch.int64)
        for own, shard in zip(rows, shards, strict=True):
            found += shard.count(pack_signs(signs)[own], *flips[own].nonzero(as_tuple=True))
        back = (flips & (signs != first))[:: stride(height)]
        rounds.append((found.tolist(), [int(flips[:: stride(height)].sum()), int(back.sum())]))
        signs[flips] *= -1
    return rounds


@given(height=st.integers(1, 70), width=st.integers(1, 17), ranks=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_any_number_of_ranks_counts_what_a_plain_reference_does(height: int, width: int, ranks: int, seed: int) -> None:
    for found, expected in counted(height, width, ranks, seed):
        assert found == expected


def test_a_flip_and_its_reversal_are_one_reversal_in_two_flips() -> None:
    bits = pack_signs(torch.ones(2, 9))
    reversals, place = Reversals(bits, 0, 2), (torch.tensor([1]), torch.tensor([8]))
    assert reversals.count(bits, *place).tolist() == [1, 0]
    bits[1, 1] ^= 1
    assert reversals.count(bits, *place).tolist() == [1, 1]


def test_flips_in_rows_that_are_not_sampled_do_not_count() -> None:
    bits = pack_signs(torch.ones(64, 8))  # every fourth row is watched
    reversals = Reversals(bits, 0, 64)
    rows = torch.tensor([0, 1, 2, 3, 4, 63])
    assert reversals.count(bits, rows, torch.zeros_like(rows)).tolist() == [2, 0]


@pytest.mark.parametrize(("height", "watched"), [(1, 1), (31, 31), (32, 16), (47, 24), (4096, 16)])
def test_short_layers_are_watched_whole_and_tall_ones_in_part(height: int, watched: int) -> None:
    reversals = Reversals(torch.zeros(height, 1, dtype=torch.uint8), 0, height)
    assert len(reversals.start) == reversals.total == watched
    assert watched == height if height < 2 * SAMPLE else SAMPLE <= watched < 2 * SAMPLE


@given(height=st.integers(1, 200), ranks=st.integers(1, 7))
def test_the_sampled_rows_of_all_ranks_are_numbered_one_after_the_other(height: int, ranks: int) -> None:
    bits, at = torch.zeros(height, 1, dtype=torch.uint8), 0
    for rank in range(ranks):
        own = Gang(rank, ranks).rows(height)
        reversals = Reversals(bits[own], own.start, height)
        assert reversals.before == at
        at += len(reversals.start)
    assert at == -(-height // stride(height))


def test_after_a_checkpoint_a_flip_back_to_the_very_first_sign_is_still_a_reversal(
    learner: Callable, tmp_path: Path
) -> None:
    schedule = FlipSchedule(0.5, 4, 1)
    before, after = (learner(5, 9, schedule, seed=seed, momentum=0.0) for seed in (0, 1))
    first = before.layer.signs()
    assert before.step(first.clone()).flips["a"] > 0  # every weight wants to flip: some do
    flipped = before.layer.signs() != first
    write_slices(before.kbop.state(), tmp_path / "rank-0.safetensors")
    after.kbop.load(SliceReader([tmp_path / "rank-0.safetensors"]), before.kbop.steps_done, before.kbop.unit)
    stats = after.step(torch.where(flipped, after.layer.signs(), 0.0))  # only what has flipped may flip
    assert stats.reversals == stats.flips != {"a": 0}
