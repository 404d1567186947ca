"""Ranks as threads of this process, and a source of known documents, for the tests of token files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from kbop_core.documents import Rows, rows_of
from kbop_core.shard import Gang
from kbop_core.token_files import PART_ROWS, Recipe, tokenise

#: A little more than two parts; every seventh row has no text.
TEXTS = ["" if n % 7 == 0 else chr(97 + n % 26) * (n % 11 + 1) for n in range(2 * PART_ROWS + 70)]


class _Meeting:
    """Where the threads exchange tensors; an error of one ends the wait of all."""

    def __init__(self, size: int) -> None:
        self.barrier, self.slots = threading.Barrier(size, timeout=30), [torch.empty(0)] * size


@dataclass(frozen=True)
class ThreadGang(Gang):
    """A gang whose all_gather is between threads."""

    meeting: _Meeting = field(default_factory=lambda: _Meeting(1))

    def all_gather(self, part: Tensor) -> list[Tensor]:
        self.meeting.slots[self.rank] = part
        self.meeting.barrier.wait()
        found = list(self.meeting.slots)
        self.meeting.barrier.wait()
        return found


def ranks(size: int, work: Callable[[Gang], None]) -> None:
    """Run `work` on every rank of a gang; raises the first rank's error that is not an echo of another's."""
    meeting = _Meeting(size)

    def run(rank: int) -> None:
        try:
            work(ThreadGang(rank, size, meeting=meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        errors = [e for e in [f.exception() for f in [pool.submit(run, r) for r in range(size)]] if e]
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error


def letters(text: str) -> list[int]:
    """A tokenizer: a BOS and one id per character."""
    return [1, *map(ord, text)]


RECIPE = Recipe(letters, 128, lambda text: True, lambda text: None, "first")


def make(
    folder: Path,
    size: int = 1,
    texts: Sequence[str] | Rows = TEXTS,
    enough: int = 10**9,
    **changes: object,
) -> Path:
    """Token files of `texts`, made by `size` ranks."""
    rows = texts if isinstance(texts, Rows) else rows_of("texts", texts)
    recipe = replace(RECIPE, **changes)  # type: ignore[arg-type]
    folder.mkdir(exist_ok=True)
    ranks(size, lambda gang: tokenise(rows, recipe, folder, enough, gang, torch.device("cpu")))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
