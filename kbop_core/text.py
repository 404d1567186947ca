"""Owns text → windows of token ids: the protocols, the train/eval split, the order of training windows.

Refuses to read files (documents.py), to resolve who may read what (jobs/sources.py) and to know any model.

Each document is tokenised in one call with the tokenizer's own special tokens (at most one BOS, at its start).

Training: the documents' tokens follow each other and are cut into full windows; the tail is dropped.
Evaluation of one document: the same (the field's WikiText-2 protocol). Of several: each document is cut by
itself, and its last, shorter window counts too, so that no story is predicted from another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kbop_core.errors import TextTooShort

#: Token ids of one document, special tokens included.
Tokenize = Callable[[str], Sequence[int]]


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

    Holds the permutation of one epoch: 8 bytes a window.

    Attributes:
        count: windows there are.
        seed: of the permutations.
        source: number of the source in a mixture: equal seeds give sources orders of their own.
    """

    count: int
    seed: int
    source: int = 0
    _held: dict[int, np.ndarray[tuple[int], np.dtype[np.int64]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def indices(self, start: int, stop: int) -> Iterator[int]:
        """Window numbers at places start … stop−1 of the endless sequence of epochs."""
        for place in range(start, stop):
            epoch, offset = divmod(place, self.count)
            yield int(self._permutation(epoch)[offset])

    def _permutation(self, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        if epoch not in self._held:
            self._held.clear()
            self._held[epoch] = np.random.default_rng([self.seed, epoch, self.source]).permutation(self.count)
        return self._held[epoch]
