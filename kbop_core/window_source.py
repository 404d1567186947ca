"""Owns which window stands at which place of the endless training order. Refuses to know ranks and steps: the loop
asks for places, and places are the same for any number of ranks.

Without weights all windows of all sources are shuffled together, anew in every epoch: a source has the share of its
size. With weights, source i has the share w_i = weight_i / Σ weight of the places, dealt as evenly as whole windows
allow, and each source has epochs of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from kbop_core.text import WindowOrder
from kbop_core.token_store import JoinedStores, TokenStore


class WindowSource(Protocol):
    """The windows that a run trains on, in its order."""

    def __len__(self) -> int:
        """How many different windows there are."""

    def numbers(self, places: range) -> list[int]:
        """Of the windows at these places; a window has the same number, 0 … len − 1, wherever it comes again."""

    def rows(self, numbers: Sequence[int]) -> Tensor:
        """Windows of these numbers, int64 (B, T) on the CPU."""

    def take(self, places: range) -> Tensor:
        """Windows at these places: `rows(numbers(places))`."""


class Order(Protocol):
    """Window numbers by place."""

    def indices(self, start: int, stop: int) -> Iterator[int]:
        """Window numbers at places start … stop−1."""


class WindowsInMemory:
    """Windows of a tensor, shuffled anew in every epoch.

    Args:
        ids_NT: int64 (N, T) on the CPU; not copied.
        seed: of the order.
    """

    def __init__(self, ids_NT: Tensor, seed: int) -> None:
        self._ids_NT, self._order = ids_NT, WindowOrder(len(ids_NT), seed)

    def __len__(self) -> int:
        return len(self._ids_NT)

    def numbers(self, places: range) -> list[int]:
        """As WindowSource.numbers."""
        return list(self._order.indices(places.start, places.stop))

    def rows(self, numbers: Sequence[int]) -> Tensor:
        """As WindowSource.rows."""
        return self._ids_NT[torch.tensor(list(numbers), dtype=torch.int64)]

    def take(self, places: range) -> Tensor:
        """As WindowSource.take."""
        return self.rows(self.numbers(places))


class StoredWindows:
    """Windows of token files in some order. Make it with `open_windows`."""

    def __init__(self, store: TokenStore | JoinedStores, order: Order) -> None:
        self._store, self._order = store, order

    def __len__(self) -> int:
        return len(self._store)

    def numbers(self, places: range) -> list[int]:
        """As WindowSource.numbers."""
        return list(self._order.indices(places.start, places.stop))

    def rows(self, numbers: Sequence[int]) -> Tensor:
        """As WindowSource.rows; raises DamagedTokens when a file is shorter than it was."""
        return self._store.rows(numbers)

    def take(self, places: range) -> Tensor:
        """As WindowSource.take."""
        return self.rows(self.numbers(places))

    def verify(self, rank: int, ranks: int) -> None:
        """Compare this rank's share of the token files with their digests; raises DamagedTokens."""
        self._store.verify(rank, ranks)


def open_windows(
    folders: Sequence[Path], names: Sequence[str], weights: Sequence[float] | None, context: int, seed: int
) -> StoredWindows:
    """The windows of tokenised sources.

    Args:
        folders: of the sources' token files.
        names: of the sources, for the error.
        weights: of the sources, each finite and > 0; None: no mixture, all windows are shuffled together.
        context: window length in tokens.
        seed: of the order.

    Raises:
        TextTooShort: no full window; in a mixture, of any source.
        DamagedTokens: an index is missing or not one.
    """
    if weights is None:
        store = TokenStore(folders, context, "the training text")
        return StoredWindows(store, WindowOrder(len(store), seed))
    stores = [TokenStore([folder], context, name) for folder, name in zip(folders, names, strict=True)]
    return StoredWindows(JoinedStores(stores), MixtureOrder([len(s) for s in stores], weights, seed))


class MixtureOrder:
    """The endless order of a mixture: at place p, source i has had w_i · p windows, give or take fewer than S.

    Source 0 takes ⌊w_0 · p⌋ of the first p places, evenly spread; of the places left, source 1 takes its share of what
    is left of the weights, and so on. Counts are exact rational arithmetic, hence equal on every machine, and any
    place is found without walking to it.

    Args:
        counts: windows of each of the S sources, ≥ 1.
        weights: of each source, finite and > 0.
        seed: of the sources' permutations.
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float], seed: int) -> None:
        exact = [Fraction(weight) for weight in weights]
        self._shares = [weight / sum(exact[i:]) for i, weight in enumerate(exact)]  # of what the sources before leave
        self._starts = [sum(counts[:i]) for i in range(len(counts))]
        self._orders = [WindowOrder(count, seed, source) for source, count in enumerate(counts)]

    def taken(self, place: int) -> list[int]:
        """Windows of each source before a place."""
        counts = []
        for share in self._shares:
            counts.append(place * share.numerator // share.denominator)
            place -= counts[-1]
        return counts

    def indices(self, start: int, stop: int) -> Iterator[int]:
        """Window numbers at places start … stop−1; those of source i follow those of the sources before it."""
        before = self.taken(start)
        for place in range(start, stop):
            after = self.taken(place + 1)
            source = next(i for i, (b, a) in enumerate(zip(before, after, strict=True)) if a > b)
            yield self._starts[source] + next(self._orders[source].indices(before[source], before[source] + 1))
            before = after
