"""The endless training order: today's for one pool of windows, exact shares for mixtures."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from token_ranks import TEXTS, letters, make

from kbop_core.errors import TextTooShort
from kbop_core.text import WindowOrder, training_windows
from kbop_core.window_source import MixtureOrder, WindowsInMemory, open_windows

WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=5)


def sources_of(order: MixtureOrder, counts: list[int], start: int, stop: int) -> list[int]:
    starts = [*itertools.accumulate(counts, initial=0)]
    return [next(i for i in range(len(counts)) if n < starts[i + 1]) for n in order.indices(start, stop)]


def test_in_memory_and_on_disk_are_the_same_windows_in_the_same_order(tmp_path: Path) -> None:
    folders = [make(tmp_path / "a", 2), make(tmp_path / "b", texts=["abcdef"] * 9)]
    documents = [*filter(None, TEXTS), *["abcdef"] * 9]
    memory = WindowsInMemory(training_windows(documents, letters, 8, "texts"), seed=3)
    disk = open_windows(folders, ["a", "b"], None, 8, seed=3)
    places = range(len(memory) - 5, len(memory) + 20)
    assert len(disk) == len(memory)
    assert disk.numbers(places) == memory.numbers(places) == list(WindowOrder(len(memory), 3).indices(*_ends(places)))
    assert torch.equal(disk.take(places), memory.take(places))


def _ends(places: range) -> tuple[int, int]:
    return places.start, places.stop


def test_a_window_is_found_again_by_its_number() -> None:
    windows = WindowsInMemory(torch.arange(40).view(10, 4), seed=0)
    assert torch.equal(windows.rows(windows.numbers(range(7, 25))), windows.take(range(7, 25)))
    assert windows.take(range(3, 3)).shape == (0, 4)


@given(WEIGHTS, st.integers(0, 10**9), st.integers(0, 3000))
def test_a_source_is_never_a_handful_of_windows_from_its_share(weights: list[float], start: int, length: int) -> None:
    order = MixtureOrder([3] * len(weights), weights, 0)
    for place in (start, start + length):
        taken = order.taken(place)
        assert sum(taken) == place
        for count, weight in zip(taken, weights, strict=True):
            assert abs(count - place * weight / sum(weights)) < len(weights)


def test_equal_weights_take_turns_and_a_quarter_comes_every_fourth_time() -> None:
    assert Counter(sources_of(MixtureOrder([5, 7], [2, 2], 0), [5, 7], 0, 1000)) == {0: 500, 1: 500}
    quarter = sources_of(MixtureOrder([5, 7], [1, 3], 0), [5, 7], 0, 400)
    assert {b - a for a, b in itertools.pairwise([i for i, s in enumerate(quarter) if s == 0])} == {4}


def test_shares_do_not_depend_on_how_large_the_sources_are() -> None:
    assert sources_of(MixtureOrder([1, 10**6], [0.3, 0.7], 0), [1, 10**6], 0, 500) == sources_of(
        MixtureOrder([10**6, 1], [0.3, 0.7], 0), [10**6, 1], 0, 500
    )


@given(st.integers(0, 99), st.data())
def test_the_order_is_the_same_wherever_it_is_entered(seed: int, data: st.DataObject) -> None:
    order = MixtureOrder([3, 5, 2], [0.5, 0.1, 0.3], seed)
    cuts = sorted(data.draw(st.sets(st.integers(0, 80), max_size=6)) | {0, 80})
    parts = [n for start, stop in itertools.pairwise(cuts) for n in order.indices(start, stop)]
    assert parts == list(MixtureOrder([3, 5, 2], [0.5, 0.1, 0.3], seed).indices(0, 80))


@pytest.mark.parametrize("counts", [[4, 9], [1, 30], [30, 1]])
def test_each_source_goes_through_epochs_of_its_own(counts: list[int]) -> None:
    numbers = list(MixtureOrder(counts, [1, 2], 0).indices(0, 600))
    for start, count in ((0, counts[0]), counts):
        own = [n - start for n in numbers if start <= n < start + count]
        for epoch in range(len(own) // count):
            assert sorted(own[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_sources_of_one_size_have_orders_of_their_own_and_so_have_seeds() -> None:
    numbers = list(MixtureOrder([50, 50], [1, 1], 0).indices(0, 100))
    first, second = ([n % 50 for n in numbers if (n < 50) == side] for side in (True, False))
    other = [n for n in MixtureOrder([50, 50], [1, 1], 1).indices(0, 100) if n < 50]
    assert len({tuple(order) for order in (first, second, other)}) == 3


def test_a_mixture_on_disk_gives_the_windows_that_its_order_names(tmp_path: Path) -> None:
    texts = [["abcdefg"] * 3, ["tuvwxyz"] * 30]
    folders = [make(tmp_path / str(n), texts=t) for n, t in enumerate(texts)]
    windows = open_windows(folders, ["a", "b"], [3.0, 1.0], 8, seed=0)
    taken = windows.take(range(40))
    assert len(windows) == 33
    assert int((taken == ord("a")).sum()) == 30 and int((taken == ord("t")).sum()) == 10
    assert torch.equal(taken, windows.rows(windows.numbers(range(40))))


def test_a_source_of_a_mixture_with_less_than_a_window_is_refused_by_name(tmp_path: Path) -> None:
    folders = [make(tmp_path / name, texts=[name * 20]) for name in ("a", "b")]
    folders.append(make(tmp_path / "c", texts=["few"]))
    with pytest.raises(TextTooShort, match="third has 4 tokens, fewer than one window of 8"):
        open_windows(folders, ["first", "second", "third"], [1, 1, 1], 8, seed=0)
    assert len(open_windows(folders, ["first", "second", "third"], None, 8, seed=0)) == 5
