"""Documents → windows: the protocols, the split, the order of training windows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kbop_core.errors import TextTooShort
from kbop_core.text import WindowOrder, evaluation_windows, split_documents, training_windows


def letters(text: str) -> list[int]:
    """A tokenizer: one id per character."""
    return [ord(c) for c in text]


def with_start(text: str) -> Sequence[int]:
    """A tokenizer that puts a BOS before every document."""
    return (1, *letters(text))


# -- windows ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.text(max_size=20), max_size=8), st.integers(2, 9))
def test_training_windows_are_the_joined_tokens_without_their_tail(documents: list[str], context: int) -> None:
    stream = [t for d in documents for t in with_start(d)]
    full = len(stream) // context
    if full == 0:
        with pytest.raises(TextTooShort):
            training_windows(documents, with_start, context, "data")
        return
    windows = training_windows(documents, with_start, context, "data")
    assert windows.dtype == torch.int64
    assert windows.shape == (full, context)
    assert windows.flatten().tolist() == stream[: full * context]


def test_one_document_is_tokenised_in_one_call() -> None:
    calls: list[str] = []
    evaluation_windows(["abc" * 100], lambda d: calls.append(d) or letters(d), 8, "data")
    assert calls == ["abc" * 100]


@pytest.mark.parametrize(("length", "windows"), [(8, 1), (9, 1), (15, 1), (16, 2), (23, 2)])
def test_one_document_is_cut_into_full_windows_and_its_tail_dropped(length: int, windows: int) -> None:
    cut = evaluation_windows(["x" * length], letters, 8, "data")
    assert cut.ids_NT.shape == (windows, 8)
    assert cut.lengths_N.tolist() == [8] * windows
    assert cut.predicted == windows * 7
    assert "full windows of 8" in cut.protocol


def test_several_documents_are_cut_each_by_itself_with_short_tails() -> None:
    cut = evaluation_windows(["abcdefghij", "kl", "m", "nopqrstu"], letters, 8, "data")
    texts = ["".join(map(chr, row[:n])) for row, n in zip(cut.ids_NT.tolist(), cut.lengths_N.tolist(), strict=True)]
    assert texts == ["abcdefgh", "ij", "kl", "nopqrstu"]
    assert cut.predicted == 7 + 1 + 1 + 7
    assert cut.protocol.startswith("4 documents")


@given(st.lists(st.text("abc", max_size=30), min_size=2, max_size=8), st.integers(2, 9))
def test_no_window_crosses_a_document_and_places_beyond_its_length_are_zero(documents: list[str], context: int) -> None:
    if sum(len(d) for d in documents) < 40:
        documents = [*documents, "abc" * 20]
    cut = evaluation_windows(documents, letters, context, "data")
    joined = [[chr(t) for t in row[:n]] for row, n in zip(cut.ids_NT.tolist(), cut.lengths_N.tolist(), strict=True)]
    expected = [list(d[i : i + context]) for d in documents for i in range(0, len(d), context)]
    assert joined == [w for w in expected if len(w) > 1]
    beyond = torch.arange(cut.ids_NT.shape[1]) >= cut.lengths_N[:, None]
    assert int(cut.ids_NT[beyond].sum()) == 0


@pytest.mark.parametrize("documents", [["abcdefg"], ["abc", "def"], ["a"] * 20, [""], []])
def test_text_shorter_than_one_window_is_refused_with_both_lengths(documents: list[str]) -> None:
    with pytest.raises(TextTooShort, match=r"stories has \d+ tokens, fewer than one window of 8"):
        evaluation_windows(documents, letters, 8, "stories")


# -- split ------------------------------------------------------------------------------------------------------------


def long_word(document: str) -> bool:
    return len(document) > 3


@given(st.text("ab \n", min_size=20, max_size=3000))
@settings(max_examples=200)
def test_one_document_is_cut_once_near_nine_tenths_and_neither_side_is_empty(text: str) -> None:
    train, held_out = (split_documents([text], side, long_word)[0] for side in ("train", "eval"))
    assert train + held_out == text
    assert held_out
    assert len(text) * 9 // 10 <= len(train)


def test_the_cut_is_at_a_lines_end_when_one_is_near() -> None:
    text = "word " * 400 + "\n" + "word " * 30
    assert split_documents([text], "eval", long_word) == ["word " * 30]


def test_without_a_line_end_near_the_cut_is_exactly_at_nine_tenths() -> None:
    assert split_documents(["x" * 20_000], "train", long_word) == ["x" * 18_000]


@given(st.lists(st.text("abc", max_size=8), min_size=2, max_size=12))
def test_several_documents_are_dealt_whole_and_each_to_one_side(documents: list[str]) -> None:
    train, held_out = (split_documents(documents, side, long_word) for side in ("train", "eval"))
    assert sorted(train + held_out) == sorted(documents)
    assert all(map(long_word, held_out))
    assert not any(map(long_word, train))


@pytest.mark.parametrize("documents", [["one"], ["one", "three"]])
def test_all_means_all(documents: list[str]) -> None:
    assert split_documents(documents, "all", long_word) == documents


# -- order ------------------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 40), seed=st.integers(0, 99), epoch=st.integers(0, 5))
def test_every_epoch_is_a_permutation_of_all_windows(count: int, seed: int, epoch: int) -> None:
    seen = list(WindowOrder(count, seed).indices(epoch * count, (epoch + 1) * count))
    assert sorted(seen) == list(range(count))


@given(st.data())
def test_the_order_is_the_same_however_it_is_asked_for(data: st.DataObject) -> None:
    order = WindowOrder(data.draw(st.integers(1, 20)), 7)
    cuts = sorted(data.draw(st.sets(st.integers(0, 60), max_size=6)) | {0, 60})
    parts = [i for start, stop in itertools.pairwise(cuts) for i in order.indices(start, stop)]
    assert parts == list(order.indices(0, 60))


def test_epochs_and_seeds_differ() -> None:
    orders = [list(WindowOrder(50, 0).indices(0, 50)), list(WindowOrder(50, 0).indices(50, 100))]
    orders.append(list(WindowOrder(50, 1).indices(0, 50)))
    assert len({tuple(o) for o in orders}) == 3
