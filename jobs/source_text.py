"""Owns which documents of a spec's sources are trained on and which are evaluated on. Refuses to tokenise, and to ask
whether a source may be read: the server did.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from jobs.demo.corpus import documents as python_docs
from jobs.sources import locate_data
from jobs.spec import DataSource
from jobs.split import is_held_out
from kbop_core.documents import Rows, file_rows, hub_rows, rows_of, up_to
from kbop_core.errors import DataOverlap
from kbop_core.text import split_documents

#: Characters after which no further document of an evaluation set is read: they stay in memory.
EVALUATION_CHARACTERS = 2**24


@dataclass(frozen=True)
class Side:
    """One side of a source's split: those of the rows' texts that `keep` says yes to."""

    rows: Rows
    keep: Callable[[str], bool]

    def documents(self) -> Iterator[str]:
        """The documents of this side, as a stream."""
        return filter(self.keep, self.rows.documents())


def read_side(source: DataSource) -> Side:
    """The side of the source that the spec asks for, to be streamed; a source that is one document is read whole.

    Raises:
        EmptyText, NotUtf8, DataError: as far as the second document; the rest when it is read.
    """
    rows = _rows(source)
    first = rows.first(2)
    if len(first) == 1:
        return Side(rows_of(rows.name, split_documents(first, source.split, is_held_out)), lambda _: True)
    if source.split == "all":
        return Side(rows, lambda _: True)
    return Side(rows, lambda text: is_held_out(text) == (source.split == "eval"))


def _rows(source: DataSource) -> Rows:
    found = locate_data(source.source)
    if found.kind == "builtin":
        return rows_of(source.source, [document.text for document in python_docs()])
    return file_rows(Path(found.location)) if found.kind == "file" else hub_rows(found.location, found.revision)


def version_of(source: DataSource) -> str:
    """The source as it is now, in words that change when a local file does: path, split, size and time of change."""
    found = locate_data(source.source)
    stat = Path(found.location).stat() if found.kind == "file" else None
    now = f"{stat.st_size} {stat.st_mtime_ns}" if stat else found.revision
    return f"{found.kind} {found.location} {source.split} {now}"


@dataclass(frozen=True)
class EvaluationText:
    """The documents of an evaluation set.

    Attributes:
        name: in the report.
        documents: in order.
        whole: whether they are all there are.
    """

    name: str
    documents: list[str]
    whole: bool


def read_evaluation(source: DataSource) -> EvaluationText:
    """Documents to evaluate on: all of them, or the first that hold EVALUATION_CHARACTERS.

    Raises:
        EmptyText, NotUtf8, DataError: the source cannot be read.
    """
    documents = read_side(source).documents()
    read = list(up_to(documents, EVALUATION_CHARACTERS))
    return EvaluationText(set_name(source), read, next(documents, None) is None)


def set_name(source: DataSource) -> str:
    """How the report calls a source: file name, built-in name or hub id, and the split unless it is all."""
    name = source.source.rsplit("/", 1)[-1] if source.source.startswith(("/", ".", "~")) else source.source
    return name if source.split == "all" else f"{name} ({source.split} split)"


def refuse_shared_source(train: Sequence[DataSource], evaluation: Sequence[DataSource]) -> None:
    """Refuse a source on both sides with splits that meet.

    Raises:
        DataOverlap: there is one.
    """
    for used in evaluation:
        for other in train:
            if used.source == other.source and {used.split, other.split} != {"train", "eval"}:
                raise DataOverlap(
                    f"{used.source} is trained on ({other.split}) and evaluated on ({used.split})",
                    "use split `train` in `data` and `eval` in `eval`, or other text",
                )


class HeldOut:
    """The documents that training must not see, as 16 bytes each."""

    def __init__(self, sets: Iterable[EvaluationText]) -> None:
        self._hashes = {_hash(text) for text in chain.from_iterable(one.documents for one in sets)}

    def refuse(self, text: str) -> None:
        """Refuse a training document that is also evaluated on.

        Raises:
            DataOverlap: it is.
        """
        if _hash(text) in self._hashes:
            raise DataOverlap(
                f"a document is both in the training and the evaluation text: {text[:60]!r}",
                "remove it from one side",
            )

    def digest(self) -> str:
        """Of the set, hex."""
        return hashlib.sha256(b"".join(sorted(self._hashes))).hexdigest()


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
