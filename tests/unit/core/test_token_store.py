"""Windows of token files: the joined tokens cut into windows, read from anywhere, damage named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from token_ranks import TEXTS, letters, make

from kbop_core.errors import DamagedTokens, TextTooShort
from kbop_core.text import training_windows
from kbop_core.token_files import part_file
from kbop_core.token_store import JoinedStores, TokenStore

DOCUMENTS = [text for text in TEXTS if text]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("tokens") / "a")


def test_the_windows_are_those_of_the_joined_documents(folder: Path) -> None:
    for context in (2, 7, 100, 3000):
        expected = training_windows(DOCUMENTS, letters, context, "texts")
        store = TokenStore([folder], context, "texts")
        assert len(store) == len(expected)
        assert torch.equal(store.rows(range(len(store))), expected)


def test_windows_span_parts_empty_parts_and_sources(tmp_path: Path) -> None:
    texts = ["ab", *[""] * 1100, "cd"]
    folders = [make(tmp_path / "a", texts=texts), make(tmp_path / "b", texts=["ef"])]
    store = TokenStore(folders, 8, "texts")
    assert store.rows([0]).tolist() == [[*letters("ab"), *letters("cd"), *letters("ef")][:8]]


@given(st.data())
def test_any_windows_in_any_order_are_what_was_asked_for(folder: Path, data: st.DataObject) -> None:
    store = TokenStore([folder], 13, "texts")
    numbers = data.draw(st.lists(st.integers(0, len(store) - 1), max_size=6))
    rows = store.rows(numbers)
    assert (rows.dtype, rows.shape) == (torch.int64, (len(numbers), 13))
    assert torch.equal(rows, training_windows(DOCUMENTS, letters, 13, "texts")[numbers])


@pytest.mark.parametrize("number", [-1, 8, 10**12])
def test_a_window_that_is_not_there_is_refused_with_the_range(folder: Path, number: int) -> None:
    store = TokenStore([folder], TokenStore([folder], 2, "texts").tokens // 8, "texts")
    with pytest.raises(IndexError, match=f"no window {number}; legal: 0 … 7"):
        store.rows([number])


def test_fewer_tokens_than_a_window_are_refused_by_name(tmp_path: Path) -> None:
    folders = [make(tmp_path / name, texts=["abc"]) for name in ("a", "b")]
    assert len(TokenStore(folders, 8, "both")) == 1
    with pytest.raises(TextTooShort, match="both has 8 tokens, fewer than one window of 9"):
        TokenStore(folders, 9, "both")


def test_joined_stores_number_windows_one_source_after_the_other(tmp_path: Path, folder: Path) -> None:
    stores = [TokenStore([make(tmp_path / "a", texts=["abcdef"])], 3, "a"), TokenStore([folder], 3, "b")]
    joined, expected = JoinedStores(stores), torch.cat([s.rows(range(len(s))) for s in stores])
    assert (len(joined), joined.starts) == (len(expected), [0, 2])
    numbers = [len(expected) - 1, 0, 2, 1, 0]
    assert torch.equal(joined.rows(numbers), expected[numbers])
    assert joined.rows([]).shape == (0, 3)


@pytest.mark.parametrize("damage", ["a changed byte", "cut off", "missing"])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_damage_is_found_by_the_rank_whose_share_it_is(tmp_path: Path, damage: str, part: int) -> None:
    file = part_file(make(tmp_path / "a"), part)
    store, content = TokenStore([file.parent], 8, "texts"), file.read_bytes()
    for rank in range(2):
        store.verify(rank, 2)
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-2] if damage == "cut off" else content[:-1] + bytes([content[-1] ^ 1]))
    store.verify(1 - part % 2, 2)
    with pytest.raises(DamagedTokens, match=f"a/{file.name} is missing or not what was written"):
        store.verify(part % 2, 2)


@pytest.mark.parametrize("left", [None, 10])
def test_a_file_that_got_shorter_while_it_is_read_is_named(tmp_path: Path, left: int | None) -> None:
    file = part_file(make(tmp_path / "a"), 1)
    store = TokenStore([file.parent], 8, "texts")
    file.unlink() if left is None else file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(DamagedTokens, match=file.name):
        store.rows(range(len(store)))


@pytest.mark.parametrize("index", [None, "", "[]", "{}", '{"dtype": "<u2", "parts": [{}], "whole": true}'])
def test_a_folder_without_an_index_is_named(tmp_path: Path, index: str | None) -> None:
    if index is not None:
        (tmp_path / "index.json").write_text(index)
    with pytest.raises(DamagedTokens, match=tmp_path.name):
        TokenStore([tmp_path], 8, "texts")
