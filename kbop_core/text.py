"""Owns text → windows of token ids: documents, tokenisation, the train/eval split, the order of training windows.

Refuses to resolve who may read what (jobs/sources.py) and to know any model.

A .txt file is one document; .jsonl (field `text`), .parquet (column `text`) and hub data sets have one per row. Each
document is tokenised in one call with the tokenizer's own special tokens (at most one BOS, at its start).

Training: the documents' tokens follow each other and are cut into full windows; the tail is dropped.
Evaluation of one document: the same (the field's WikiText-2 protocol). Of several: each document is cut by
itself, and its last, shorter window counts too, so that no story is predicted from another one.
"""

from __future__ import annotations

import codecs
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kbop_core.errors import DataError, EmptyText, NotUtf8, TextTooShort

#: Token ids of one document, special tokens included.
Tokenize = Callable[[str], Sequence[int]]


def read_documents(path: Path) -> list[str]:
    """Documents of a local .txt, .jsonl or .parquet file, empty ones left out.

    Raises:
        NotUtf8, EmptyText, DataError: each names the file.
    """
    suffix = path.suffix.lower()
    if suffix not in {".txt", ".jsonl", ".parquet"}:
        raise DataError(f"{path.name}: unknown kind of text file", "give .txt, .jsonl with a field `text`, or .parquet")
    if suffix != ".parquet":
        _check_utf8(path)
    if path.stat().st_size == 0:
        raise EmptyText(f"{path.name} is empty", "give a file with at least one window of tokens")
    documents = [path.read_text(encoding="utf-8")] if suffix == ".txt" else _rows(suffix[1:], path)
    documents = [d for d in documents if d.strip()]
    if not documents:
        raise EmptyText(f"{path.name} holds no text", "give a file with at least one window of tokens")
    return documents


def read_hub_documents(name: str, revision: str | None) -> list[str]:
    """Documents of a hub data set: the column `text` of its `train` split."""
    import datasets  # slow to import, and only this branch needs the network

    try:
        table = datasets.load_dataset(name, split="train", revision=revision)
        return [d for d in table["text"] if d and d.strip()]
    except Exception as error:  # the library raises many kinds; all mean that this data cannot be had
        raise DataError(f"cannot load data set {name}: {error}", "check the name, or give a local file") from error


def _rows(kind: str, path: Path) -> list[str]:
    import datasets
    import pyarrow.parquet

    builder = {"jsonl": "json", "parquet": "parquet"}[kind]
    try:
        if kind == "parquet" and pyarrow.parquet.read_metadata(path).num_rows == 0:
            return []
        table = datasets.load_dataset(builder, data_files=str(path), split="train", streaming=True)
        texts = [row["text"] for row in table if row["text"] is not None]
    except KeyError:
        raise DataError(f"{path.name} has no field `text`", "each row needs its text in a field of that name") from None
    except Exception as error:  # parse errors of pyarrow and of the loader come as many types
        raise DataError(f"{path.name} cannot be read as {kind}: {error}", "repair or convert the file") from error
    other = next((t for t in texts if not isinstance(t, str)), None)
    if other is not None:
        raise DataError(f"{path.name}: a `text` is {other!r}, not a string", "put each text in quotes")
    return texts


def _check_utf8(path: Path) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        try:
            while chunk := file.read(1 << 20):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            near = file.tell()
            raise NotUtf8(
                f"{path.name} is not UTF-8: {error.reason} in the {1 << 20} bytes before byte {near}",
                "convert it, for example with `iconv -t utf-8`",
            ) from None


@dataclass(frozen=True)
class Windows:
    """Windows of tokens to evaluate on.

    Attributes:
        ids_NT: int64 (N, T); places beyond a window's length hold 0.
        lengths_N: int64 (N,), tokens of each window, 2 … T.
        protocol: how they were cut, in words, for the report.
    """

    ids_NT: Tensor
    lengths_N: Tensor
    protocol: str

    @property
    def predicted(self) -> int:
        """Tokens that are predicted: all but the first of each window."""
        return int((self.lengths_N - 1).sum())


def training_windows(documents: Sequence[str], tokenize: Tokenize, context: int, name: str) -> Tensor:
    """Full windows of the documents' joined tokens, int64 (N, context), N ≥ 1.

    Args:
        documents: texts in order.
        tokenize: one document → ids.
        context: window length in tokens, ≥ 2.
        name: of the data, for the error.

    Raises:
        TextTooShort: fewer tokens than one window.
    """
    parts = [np.asarray(tokenize(d), dtype=np.int64) for d in documents]
    stream = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
    count = len(stream) // context
    if count == 0:
        raise TextTooShort(
            f"{name} has {len(stream)} tokens, fewer than one window of {context}",
            f"give at least {context} tokens, or a smaller `method.context`",
        )
    return torch.from_numpy(stream[: count * context].reshape(count, context).copy())


def evaluation_windows(documents: Sequence[str], tokenize: Tokenize, context: int, name: str) -> Windows:
    """Windows by the protocol in this module's head; arguments and errors as for training_windows."""
    if len(documents) == 1:
        ids = training_windows(documents, tokenize, context, name)
        lengths = torch.full((len(ids),), context)
        return Windows(ids, lengths, f"one document, full windows of {context}, tail dropped")
    parts = [list(tokenize(d)) for d in documents]
    cut = [p[i : i + context] for p in parts for i in range(0, len(p), context)]
    cut = [window for window in cut if len(window) > 1]
    if sum(map(len, cut)) < context:
        raise TextTooShort(
            f"{name} has {sum(map(len, cut))} tokens, fewer than one window of {context}",
            f"give at least {context} tokens, or a smaller `method.context`",
        )
    ids = torch.zeros(len(cut), max(map(len, cut)), dtype=torch.int64)
    for row, window in enumerate(cut):
        ids[row, : len(window)] = torch.tensor(window)
    lengths = torch.tensor([len(window) for window in cut])
    return Windows(ids, lengths, f"{len(documents)} documents, each in windows of {context}, short last ones counted")


def split_documents(documents: Sequence[str], split: str, held_out: Callable[[str], bool]) -> list[str]:
    """Documents of one side of the split.

    A single document is cut at nine tenths of its characters (at a line's end when there is one near); several are
    dealt whole, by `held_out`.

    Args:
        documents: all of them.
        split: "all", "train" or "eval".
        held_out: whether a document belongs to "eval".
    """
    if split == "all":
        return list(documents)
    if len(documents) == 1:
        text = documents[0]
        cut = len(text) * 9 // 10
        line = text.find("\n", cut, len(text) - 1)
        cut = line + 1 if 0 <= line < cut + 1000 else cut
        return [text[:cut] if split == "train" else text[cut:]]
    return [d for d in documents if held_out(d) == (split == "eval")]


@dataclass(frozen=True)
class WindowOrder:
    """The order in which training sees its windows: every epoch a new permutation, the same for any number of ranks.

    Attributes:
        count: windows there are.
        seed: of the permutations.
    """

    count: int
    seed: int

    def indices(self, start: int, stop: int) -> Iterator[int]:
        """Window numbers at places start … stop−1 of the endless sequence of epochs."""
        for place in range(start, stop):
            epoch, offset = divmod(place, self.count)
            yield int(_permutation(self.count, self.seed, epoch)[offset])


@functools.lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.random.default_rng([seed, epoch]).permutation(count)
