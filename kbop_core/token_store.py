"""Owns windows of token ids on disk: how many there are, and any of them. Refuses to order them (window_source.py) and
to make the files (token_files.py).

Windows are `context` consecutive tokens of the parts of one or more sources, joined in order; a window may span parts,
the tail is dropped. Each window is read from its place in the file when it is asked for, and the operating system
caches what is read often. A memory map would do the same, but its pages count as this process's memory, and a map per
part meets the kernel's limit on maps at some ten thousand parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kbop_core.checkpoint import sha256
from kbop_core.errors import DamagedTokens, TextTooShort
from kbop_core.token_files import Index, part_file, read_index

Ids = np.ndarray[tuple[int], np.dtype[np.int64]]


class TokenStore:
    """Windows over the joined token files of some sources.

    Args:
        folders: of the sources, in order, each finished by `tokenise`.
        context: window length in tokens.
        name: of the text, for the error.

    Raises:
        TextTooShort: fewer tokens than one window.
        DamagedTokens: an index is missing or not one.
    """

    def __init__(self, folders: Sequence[Path], context: int, name: str) -> None:
        self.context = context
        self._files = [file for folder in folders for file in _files(folder)]
        ends = np.cumsum([file.tokens for file in self._files], dtype=np.int64)
        self._starts: Ids = np.concatenate([np.zeros(1, dtype=np.int64), ends])
        self.tokens = int(self._starts[-1])
        if self.tokens < context:
            raise TextTooShort(
                f"{name} has {self.tokens} tokens, fewer than one window of {context}",
                f"give at least {context} tokens, or a smaller `method.context`",
            )

    def __len__(self) -> int:
        return self.tokens // self.context

    def rows(self, numbers: Sequence[int]) -> Tensor:
        """Windows of these numbers, each 0 … len − 1, in their order: int64 (B, T), freshly allocated.

        Raises:
            IndexError: there is no window of such a number.
            DamagedTokens: a file is shorter than it was.
        """
        ids_BT = np.empty((len(numbers), self.context), dtype=np.int64)
        for row, number in enumerate(numbers):
            if not 0 <= number < len(self):
                raise IndexError(f"there is no window {number}; legal: 0 … {len(self) - 1}")
            self._read(number * self.context, ids_BT[row])
        return torch.from_numpy(ids_BT)

    def verify(self, rank: int, ranks: int) -> None:
        """Compare this rank's share of the files with their digests.

        Raises:
            DamagedTokens: a file is missing or not what was written.
        """
        for file in self._files[rank::ranks]:
            if not file.path.is_file() or sha256(file.path) != file.sha256:
                raise _damaged(file.path)

    def _read(self, start: int, out: Ids) -> None:
        """Fill `out` with the tokens from place `start` of the joined files."""
        number, done = int(np.searchsorted(self._starts, start, side="right")) - 1, 0
        while done < len(out):
            file, offset = self._files[number], start + done - int(self._starts[number])
            wanted = min(len(out) - done, file.tokens - offset)
            found = file.read(offset, wanted)
            if len(found) != wanted:
                raise _damaged(file.path)
            out[done : done + wanted] = found
            number, done = number + 1, done + wanted


class JoinedStores:
    """Windows of several stores of one context, numbered one store after the other; no window spans two stores."""

    def __init__(self, stores: Sequence[TokenStore]) -> None:
        self._stores = stores
        self.context = stores[0].context
        self.starts = [sum(map(len, stores[:number])) for number in range(len(stores))]

    def __len__(self) -> int:
        return sum(map(len, self._stores))

    def rows(self, numbers: Sequence[int]) -> Tensor:
        """As TokenStore.rows."""
        if not numbers:
            return torch.empty(0, self.context, dtype=torch.int64)
        sources = np.searchsorted(self.starts, numbers, side="right") - 1
        return torch.cat(
            [self._stores[s].rows([n - self.starts[s]]) for n, s in zip(numbers, sources.tolist(), strict=True)]
        )

    def verify(self, rank: int, ranks: int) -> None:
        """As TokenStore.verify."""
        for store in self._stores:
            store.verify(rank, ranks)


@dataclass(frozen=True)
class _TokenFile:
    path: Path
    dtype: np.dtype[np.integer]
    tokens: int
    sha256: str

    def read(self, offset: int, wanted: int) -> np.ndarray[tuple[int], np.dtype[np.integer]]:
        try:
            return np.fromfile(self.path, self.dtype, wanted, offset=offset * self.dtype.itemsize)
        except OSError:
            raise _damaged(self.path) from None


def _files(folder: Path) -> Iterator[_TokenFile]:
    try:
        index: Index = read_index(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedTokens(f"{folder.name} has no readable index of tokens: {error}", REMAKE) from None
    for number, part in enumerate(index.parts):
        yield _TokenFile(part_file(folder, number), np.dtype(index.dtype), part.tokens, part.sha256)


#: What to do about damaged token files.
REMAKE = "the next attempt makes it again; if this comes back, check the disk"


def _damaged(path: Path) -> DamagedTokens:
    return DamagedTokens(f"{path.parent.name}/{path.name} is missing or not what was written", REMAKE)
