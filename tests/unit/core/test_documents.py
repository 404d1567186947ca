"""Files and hub data sets → documents: what is one, what is refused, and reading from the middle."""

from __future__ import annotations

import json
import tracemalloc
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kbop_core.documents import file_rows, hub_rows, read_documents, rows_of, up_to
from kbop_core.errors import DataError, EmptyText, NotUtf8

MIB = 1 << 20


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.TXT"])
def test_a_text_file_is_one_document(tmp_path: Path, name: str) -> None:
    assert read_documents(write(tmp_path, name, "één\n\ntwee\n")) == ["één\n\ntwee\n"]


def test_jsonl_has_a_document_per_row_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    rows = [{"text": "one", "id": 1}, {"text": ""}, {"text": " \n"}, {"text": "two\nlines", "id": 2}]
    path = write(tmp_path, "a.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    assert read_documents(path) == ["one", "two\nlines"]


def test_parquet_has_a_document_per_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["one", "", "two"], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    assert read_documents(tmp_path / "a.parquet") == ["one", "two"]


@pytest.mark.parametrize("row", ['{"text": null}', '{"other": "x"}'])
def test_a_row_without_text_is_no_document(tmp_path: Path, row: str) -> None:
    assert read_documents(write(tmp_path, "a.jsonl", f'{{"text": "one"}}\n{row}\n')) == ["one"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("content", ["", "\n", "  \n\t\n"])
def test_a_file_without_text_is_refused_by_name(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(EmptyText, match=name):
        read_documents(write(tmp_path, name, content))


def test_a_parquet_without_rows_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(EmptyText, match=r"a\.parquet"):
        read_documents(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "x", "unknown kind of text file"),
        ("a.jsonl", '{"other": "x"}\n', "no field `text`"),
        ("a.jsonl", '{"text": "one"}\n{broken\n', "cannot be read as jsonl"),
        ("a.parquet", "not parquet", "cannot be read as parquet"),
    ],
)
def test_a_file_of_the_wrong_kind_is_refused_with_the_reason(
    tmp_path: Path, name: str, content: str, words: str
) -> None:
    with pytest.raises(DataError, match=f"{name}.*{words}"):
        read_documents(write(tmp_path, name, content))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("before", [0, 10, MIB - 1, MIB, MIB + 5])
def test_bytes_that_are_not_utf8_are_refused_wherever_they_are(tmp_path: Path, name: str, before: int) -> None:
    with pytest.raises(NotUtf8, match=f"{name} is not UTF-8"):
        read_documents(write(tmp_path, name, b"a" * before + b"\xff" + b"a" * 10))


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_character_cut_at_the_chunk_border_is_fine(tmp_path: Path, cut: int) -> None:
    text = "a" * (MIB - cut) + "😀" + "b"
    assert read_documents(write(tmp_path, "a.txt", text)) == [text]


def test_a_character_cut_off_at_the_end_is_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(NotUtf8):
        read_documents(write(tmp_path, "a.txt", "a😀".encode()[:-1]))


def stories(folder: Path, kind: str) -> Path:
    """Ten rows; row 3 has no text."""
    texts = [None if n == 3 else f"story {n}" for n in range(10)]
    if kind == "parquet":
        pq.write_table(pa.table({"n": range(10), "text": texts}), folder / "a.parquet", row_group_size=4)
        return folder / "a.parquet"
    return write(folder, "a.jsonl", "".join(json.dumps({"n": n, "text": t}) + "\n" for n, t in enumerate(texts)))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub", "memory"])
@pytest.mark.parametrize("start", [0, 1, 3, 4, 5, 8, 9, 10, 11])
def test_rows_opened_in_the_middle_are_those_from_there_on(tmp_path: Path, kind: str, start: int) -> None:
    if kind == "memory":
        rows = rows_of("a", [f"story {n}" if n != 3 else "" for n in range(10)])
    else:
        path = stories(tmp_path, "parquet" if kind == "hub" else kind)
        rows = hub_rows(str(tmp_path), None) if kind == "hub" else file_rows(path)
    expected = [f"story {n}" if n != 3 else None for n in range(10)]
    assert [text or None for text in map(rows.decode, rows.open(start))] == expected[start:]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_broken_row_is_met_only_by_who_decodes_it(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write(tmp_path, path.name, '{"text": 5}\n{"text": "two"}\n')
    else:
        pq.write_table(pa.table({"text": pa.array([b"\xff", b"two"]).cast(pa.string(), safe=False)}), path)
    rows = file_rows(path)
    assert rows.decode(next(rows.open(1))) == "two"
    with pytest.raises(DataError, match=path.name):
        rows.first(2)


def test_a_stream_reads_no_further_than_it_is_asked(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"text": "one"}\n{"text": "two"}\n{broken\n')
    assert file_rows(path).first(2) == ["one", "two"]
    assert list(islice(file_rows(path).documents(), 1)) == ["one"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_stream_never_holds_more_than_a_piece_of_the_file(tmp_path: Path, kind: str) -> None:
    texts, path = ["x" * (MIB // 16)] * 512, tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=16, compression="none", use_dictionary=False)
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert path.stat().st_size > 32 * MIB
    before, held = pa.total_allocated_bytes(), 0
    tracemalloc.start()
    for _ in file_rows(path).documents():
        held = max(held, pa.total_allocated_bytes() - before + tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert held < 12 * MIB


@pytest.mark.parametrize("row", ['{"text": 5}', '{"text": ["a"]}', '{"text": {"a": "b"}}'])
def test_a_text_that_is_no_string_is_refused_with_its_line(tmp_path: Path, row: str) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl: a `text` in line 2 is .*, not a string"):
        read_documents(write(tmp_path, "a.jsonl", f'{{"text": "one"}}\n{row}\n'))


@pytest.mark.parametrize("row", ["[1]", "5", '"words"', '{"text": "\\ud800"}'])
def test_a_row_that_is_no_object_or_no_unicode_is_refused_with_its_line(tmp_path: Path, row: str) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read as jsonl: .* in line 2"):
        read_documents(write(tmp_path, "a.jsonl", f'{{"text": "one"}}\n{row}\n'))


def test_a_byte_order_mark_and_line_separators_within_texts_do_no_harm(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + json.dumps({"text": "one\u2028two\x85"}, ensure_ascii=False).encode()
    assert read_documents(write(tmp_path, "a.jsonl", content)) == ["one\u2028two\x85"]


def test_fields_beside_the_text_may_be_of_any_type_in_any_row(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"id": 1, "text": "one"}\n\n{"id": "b", "text": "two"}')
    assert read_documents(path) == ["one", "two"]


def test_a_data_set_that_cannot_be_had_is_refused_by_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["one"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=f"cannot load data set {tmp_path}"):
        hub_rows(str(tmp_path), None).first(1)


@pytest.mark.parametrize(("characters", "read"), [(1, 1), (3, 1), (4, 2), (6, 2), (7, 3), (99, 3)])
def test_reading_stops_at_the_document_that_reaches_the_limit(characters: int, read: int) -> None:
    texts = ["one", "two", "xyz"]
    assert list(up_to(texts, characters)) == texts[:read]
