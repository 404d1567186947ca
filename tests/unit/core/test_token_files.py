"""Documents → token files: the same bytes for any number of ranks, whole or absent, remade when damaged."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from token_ranks import RECIPE, TEXTS, contents, letters, make

from kbop_core.documents import Rows, rows_of
from kbop_core.errors import DataError, UnsupportedModel
from kbop_core.token_files import PART_ROWS, part_file, read_index

DOCUMENTS = [text for text in TEXTS if text]


def ids(folder: Path) -> list[int]:
    index = read_index(folder)
    parts = [np.fromfile(part_file(folder, n), index.dtype) for n in range(len(index.parts))]
    return [int(i) for part in parts for i in part]


class Killed(BaseException):
    """What ends a rank without any orderly end."""


def killed_at(text: str) -> dict[str, object]:
    """A recipe's change: tokenising stops for good at a document."""

    def tokenize(document: str) -> list[int]:
        if document == text:
            raise Killed
        return letters(document)

    return {"tokenize": tokenize}


def counted(calls: list[str]) -> dict[str, object]:
    return {"tokenize": lambda text: calls.append(text) or letters(text)}


def test_parts_hold_the_tokens_of_every_document_in_order(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    index = read_index(folder)
    assert ids(folder) == [token for text in DOCUMENTS for token in letters(text)]
    assert [part.rows for part in index.parts] == [PART_ROWS, PART_ROWS, 70]
    assert (index.documents, index.tokens, index.whole) == (len(DOCUMENTS), len(ids(folder)), True)


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("enough", [1, 3500, 10**9])
def test_any_number_of_ranks_leaves_the_same_bytes(tmp_path: Path, size: int, enough: int) -> None:
    alone = make(tmp_path / "alone", enough=enough)
    assert contents(make(tmp_path / "shared", size, enough=enough)) == contents(alone)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (2, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("row", [5, PART_ROWS + 5, 2 * PART_ROWS + 5])
def test_a_killed_run_goes_on_with_any_number_of_ranks(tmp_path: Path, before: int, after: int, row: int) -> None:
    texts = [*TEXTS[:row], "the last one", *TEXTS[row:]]
    whole = contents(make(tmp_path / "whole", texts=texts))
    with pytest.raises(Killed):
        make(tmp_path / "a", before, texts, **killed_at("the last one"))
    assert not (tmp_path / "a" / "index.json").exists()
    assert contents(make(tmp_path / "a", after, texts)) == whole


def test_what_is_whole_is_not_tokenised_again(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        make(tmp_path / "a", texts=[*TEXTS, "the last one"], **killed_at("the last one"))
    calls: list[str] = []
    make(tmp_path / "a", texts=[*TEXTS, "the last one"], **counted(calls))
    assert calls == [*filter(None, TEXTS[2 * PART_ROWS :]), "the last one"]


def test_a_resumed_run_opens_the_source_at_the_first_row_it_needs(tmp_path: Path) -> None:
    opened: list[int] = []
    texts = rows_of("a", TEXTS)
    rows = Rows("a", lambda start: opened.append(start) or texts.open(start), texts.decode)
    folder = make(tmp_path / "a", texts=rows)
    part_file(folder, 1).unlink()
    make(folder, texts=rows)
    assert opened == [0, PART_ROWS]


@pytest.mark.parametrize("damage", ["a changed byte", "cut off", "missing", "no description", "another recipe"])
def test_a_part_that_is_not_what_was_written_is_made_again(tmp_path: Path, damage: str) -> None:
    folder = make(tmp_path / "a")
    whole, file = contents(folder), part_file(folder, 1)
    content = file.read_bytes()
    if damage == "another recipe":
        described = json.loads(file.with_suffix(".json").read_text()) | {"made_from": "second"}
        file.with_suffix(".json").write_text(json.dumps(described))
    elif damage in {"missing", "no description"}:
        (file if damage == "missing" else file.with_suffix(".json")).unlink()
    else:
        file.write_bytes(content[:-2] if damage == "cut off" else bytes([content[0] ^ 1]) + content[1:])
    calls: list[str] = []
    assert contents(make(folder, **counted(calls))) == whole
    assert calls == [*filter(None, TEXTS[PART_ROWS : 2 * PART_ROWS])]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_reading_stops_with_the_part_that_is_enough(tmp_path: Path, size: int) -> None:
    first = read_index(make(tmp_path / "whole")).parts[0]
    for enough, parts in ((1, 1), (first.tokens, 1), (first.tokens + 1, 2)):
        index = read_index(make(tmp_path / f"{size}-{enough}", size, enough=enough))
        assert (len(index.parts), index.whole) == (parts, False)


@pytest.mark.parametrize("rows", [0, 1, PART_ROWS - 1, PART_ROWS, PART_ROWS + 1, 2 * PART_ROWS])
@pytest.mark.parametrize("size", [1, 2])
def test_sources_that_end_at_a_parts_border_are_whole(tmp_path: Path, size: int, rows: int) -> None:
    folder = make(tmp_path / "a", size, ["ab"] * rows)
    index = read_index(folder)
    assert (index.whole, index.documents, len(index.parts)) == (True, rows, -(-rows // PART_ROWS))
    assert len(contents(folder)) == 2 * len(index.parts) + 1


def test_only_kept_documents_are_tokenised_and_hashed(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", texts=["one", "three", "two"], keep=lambda text: len(text) == 3)
    (part,) = read_index(folder).parts
    assert ids(folder) == [*letters("one"), *letters("two")]
    assert part.text_sha256 == hashlib.sha256(b"one\0two\0").hexdigest()


@pytest.mark.parametrize(("vocabulary", "dtype"), [(1 << 16, "<u2"), ((1 << 16) + 1, "<u4")])
def test_ids_take_two_bytes_where_the_vocabulary_fits(tmp_path: Path, vocabulary: int, dtype: str) -> None:
    largest = vocabulary - 1
    folder = make(tmp_path / "a", texts=["a"], vocabulary=vocabulary, tokenize=lambda _: [0, largest])
    assert (read_index(folder).dtype, ids(folder)) == (dtype, [0, largest])
    assert replace(RECIPE, vocabulary=vocabulary).dtype == dtype


def test_a_token_beyond_the_vocabulary_is_refused_before_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="gives token 122, the model's embedding ends at 121"):
        make(tmp_path / "a", texts=["az"], vocabulary=122)
    assert not part_file(tmp_path / "a", 0).exists()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_document_that_may_not_be_used_ends_every_rank(tmp_path: Path, size: int) -> None:
    def refuse(text: str) -> None:
        if text == "secret":
            raise DataError("found it")

    with pytest.raises(DataError, match="found it"):
        make(tmp_path / "a", size, [*TEXTS, "secret"], check=refuse)
    assert not (tmp_path / "a" / "index.json").exists()
