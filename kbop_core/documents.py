"""Owns the reading of text: files and hub data sets as streams of rows. Refuses to tokenise and to split.

A .txt file is one document; .jsonl (field `text`), .parquet (column `text`) and hub data sets have one per row. Rows
without text are no documents. A stream holds one row at a time (.parquet: one row group, a hub data set: what
`datasets` buffers), so only a .txt must fit in memory.

Rows are opened at a number and decoded apart from being read: ranks that share a source pass over each other's rows
for next to nothing. Local files are read here and not by `datasets`, whose JSON reader parses every row it skips,
infers types from other rows (a number among the texts of a column changes how all of them come out) and cannot name
the line that is broken.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from kbop_core.errors import DataError, EmptyText, KbopError, NotUtf8

#: Rows decoded at a time from a .parquet file.
PARQUET_BATCH = 64


@dataclass(frozen=True)
class Rows:
    """The rows of one source, in an order that never changes.

    Attributes:
        name: of the source, for errors.
        open: number of a row → undecoded rows from there to the end.
        decode: undecoded row → its text; None when it has none.
    """

    name: str
    open: Callable[[int], Iterator[Any]]
    decode: Callable[[Any], str | None]

    def documents(self) -> Iterator[str]:
        """Every text that holds more than white space."""
        return (text for text in map(self.decode, self.open(0)) if text and not text.isspace())

    def first(self, count: int) -> list[str]:
        """The first documents, at least one.

        Raises:
            EmptyText: there is none.
        """
        found = list(islice(self.documents(), count))
        if not found:
            raise EmptyText(f"{self.name} holds no text", "give text with at least one window of tokens")
        return found


def rows_of(name: str, texts: Sequence[str]) -> Rows:
    """Texts in memory as a source."""
    return Rows(name, lambda start: islice(iter(texts), start, None), lambda text: text)


def file_rows(path: Path) -> Rows:
    """A local .txt, .jsonl or .parquet file as a source; opening and decoding raise what is listed.

    Raises:
        NotUtf8, EmptyText, DataError: each names the file.
    """
    kinds = {".txt": _whole, ".jsonl": _json_lines, ".parquet": _parquet}
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise DataError(f"{path.name}: unknown kind of text file", "give .txt, .jsonl with a field `text`, or .parquet")
    if path.stat().st_size == 0:
        raise EmptyText(f"{path.name} is empty", "give a file with at least one window of tokens")
    return kind(path)


def hub_rows(name: str, revision: str | None) -> Rows:
    """The column `text` of a hub data set's `train` split as a source, streamed: nothing is read ahead or kept.

    Args:
        name: hub id, or a folder in the form of a hub repository.
        revision: of the repository.
    """

    def rows(start: int) -> Iterator[Any]:
        import datasets  # slow to import, and only this branch needs the network

        try:
            table = datasets.load_dataset(name, split="train", revision=revision, streaming=True)
            yield from table.select_columns("text").skip(start)
        except Exception as error:  # the library raises many kinds; all mean that this data cannot be had
            raise DataError(f"cannot load data set {name}: {error}", "check the name, or give a local file") from error

    return Rows(name, rows, lambda row: _checked(name, row["text"]))


def read_documents(path: Path) -> list[str]:
    """Documents of a local .txt, .jsonl or .parquet file, in memory.

    Raises:
        NotUtf8, EmptyText, DataError: each names the file.
    """
    rows = file_rows(path)
    rows.first(1)
    return list(rows.documents())


def up_to(documents: Iterable[str], characters: int) -> Iterator[str]:
    """Documents from the start until they hold `characters`; the one that reaches it is the last."""
    for document in documents:
        yield document
        characters -= len(document)
        if characters <= 0:
            return


def _whole(path: Path) -> Rows:
    def rows(start: int) -> Iterator[str]:
        try:
            yield from [path.read_text(encoding="utf-8")][start:]
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error, "") from None

    return Rows(path.name, rows, lambda text: text)


def _json_lines(path: Path) -> Rows:
    def lines(start: int) -> Iterator[tuple[int, bytes]]:
        named = False
        with path.open("rb") as file:
            for row, line in islice(enumerate(file), start, None):
                named = named or b'"text"' in line or line.isspace()
                yield row, line
        if start == 0 and not named:
            raise _no_field(path)

    def decode(numbered: tuple[int, bytes]) -> str | None:
        row, line = numbered
        place = f"in line {row + 1}"
        try:
            text = (line.removeprefix(codecs.BOM_UTF8) if row == 0 else line).decode()
            value = json.loads(text) if not text.isspace() else {}
            found = _checked(path.name, value.get("text"), place)
            return found if found is None or found.encode() else None  # lone surrogates have no UTF-8 form
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error, place) from None
        except (ValueError, AttributeError, RecursionError) as error:
            raise DataError(f"{path.name} cannot be read as jsonl: {error} {place}", "repair the line") from None

    return Rows(path.name, lines, decode)


def _parquet(path: Path) -> Rows:
    import pyarrow.parquet  # slow to import

    def cells(start: int) -> Iterator[Any]:
        try:
            with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:  # True: all row groups in memory
                groups = _groups_from(file.metadata, start)
                if "text" not in file.schema_arrow.names:
                    raise _no_field(path)
                batches = file.iter_batches(PARQUET_BATCH, groups.numbers, columns=["text"])
                yield from islice((cell for batch in batches for cell in batch.column(0)), groups.offset, None)
        except KbopError:
            raise
        except Exception as error:  # pyarrow has a type for each way a file can be broken
            raise DataError(f"{path.name} cannot be read as parquet: {error}", "repair or convert the file") from error

    def decode(cell: Any) -> str | None:
        try:
            return _checked(path.name, cell.as_py())
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error, "in a row") from None

    return Rows(path.name, cells, decode)


@dataclass(frozen=True)
class _Groups:
    """Row groups that hold the rows from some row on, and the place of that row in the first of them."""

    numbers: list[int]
    offset: int


def _groups_from(metadata: Any, start: int) -> _Groups:
    first, offset = 0, start
    while first < metadata.num_row_groups and offset >= metadata.row_group(first).num_rows:
        offset -= metadata.row_group(first).num_rows
        first += 1
    return _Groups(list(range(first, metadata.num_row_groups)), offset)


def _checked(name: str, text: object, place: str = "") -> str | None:
    if text is None or isinstance(text, str):
        return text
    where = f" {place}" if place else ""
    raise DataError(f"{name}: a `text`{where} is {text!r}, not a string", "put each text in quotes")


def _no_field(path: Path) -> DataError:
    return DataError(f"{path.name} has no field `text`", "each row needs its text in a field of that name")


def _not_utf8(path: Path, error: UnicodeDecodeError, place: str) -> NotUtf8:
    where = f"at byte {error.start} {place}".strip()
    return NotUtf8(f"{path.name} is not UTF-8: {error.reason} {where}", "convert it, for example with `iconv -t utf-8`")
