"""Owns a teacher's targets on disk: its likeliest tokens at every position of the windows that a run will see.

Written once by all ranks, read window by window while training, so that no teacher is in memory then. A position
takes k token ids (2 bytes, or 4 beyond 65,536 tokens), k log-probabilities and the rest's, 2 bytes each: 258 bytes with
k = 64. Half precision moves a log-probability of −4 by up to 0.002.
Refuses to know models: it is given a function from token ids to log-probabilities.

    targets-00000.safetensors …    ids (W, T, K), log_p (W, T, K), log_rest (W, T) of `PART` windows, by their
                                   numbers, which are in the header; a part is complete or not there, so that a
                                   stopped run goes on; one of other windows is written anew
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kbop_core.checkpoint import save_tensors
from kbop_core.distill import TopTargets, top_targets
from kbop_core.shard import Gang

#: Tokens kept at each position, at most.
TOP = 64
#: Windows in a file.
PART = 64
#: Files held open.
OPEN = 32

#: int64 (B, T) token ids → float32 (B, T, V) log-probabilities.
LogProbs = Callable[[Tensor], Tensor]


class TargetCache:
    """The targets of one run.

    Args:
        folder: on a file system that all ranks see.
        numbers: of the windows that the run will see; any order, repeats are one.
    """

    def __init__(self, folder: Path, numbers: Sequence[int]) -> None:
        self._folder = folder
        self._numbers = sorted(set(numbers))
        self._place = {number: place for place, number in enumerate(self._numbers)}
        self._files: OrderedDict[int, Any] = OrderedDict()

    @property
    def parts(self) -> int:
        """Files there will be."""
        return -(-len(self._numbers) // PART)

    def _path(self, part: int) -> Path:
        return self._folder / f"targets-{part:05d}.safetensors"

    def write(
        self,
        gang: Gang,
        rows: Callable[[Sequence[int]], Tensor],
        log_probs: LogProbs,
        batch: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Write the parts that are missing: part p by rank p mod N. The caller waits for the other ranks afterwards.

        Args:
            gang: the ranks.
            rows: window numbers → int64 (B, T).
            log_probs: the teacher.
            batch: windows in one forward pass, ≥ 1.
            progress: told (windows done, windows) of this rank after each forward pass: a whole part may take hours
                with a teacher that is read from disk.

        Raises:
            DiskFull: no space; what is complete stays.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        mine = range(gang.rank, self.parts, gang.size)
        done, total = 0, sum(len(self._numbers_of(part)) for part in mine)
        for part in mine:
            written, count = self._is_written(part), len(self._numbers_of(part))
            for windows in [count] if written else self._write_part(part, rows, log_probs, batch):
                done += windows
                progress(done, total)

    def _numbers_of(self, part: int) -> list[int]:
        return self._numbers[part * PART : (part + 1) * PART]

    def _is_written(self, part: int) -> bool:
        """Whether a part is there, readable, and of these windows: a run that goes on on other ranks may see others."""
        if not self._path(part).is_file():
            return False
        try:
            with safe_open(self._path(part), framework="pt") as file:
                return (file.metadata() or {}).get("windows") == json.dumps(self._numbers_of(part))
        except (OSError, SafetensorError):
            return False

    def _write_part(
        self, part: int, rows: Callable[[Sequence[int]], Tensor], log_probs: LogProbs, batch: int
    ) -> Iterator[int]:
        """Yields the windows of each forward pass; when it has ended the file is there."""
        numbers = self._numbers_of(part)
        found = []
        for start in range(0, len(numbers), batch):
            log_p = log_probs(rows(numbers[start : start + batch]))
            vocabulary = log_p.shape[-1]
            targets = top_targets(log_p, min(TOP, vocabulary))
            ids = targets.ids_BTK.to(torch.uint16 if vocabulary <= 2**16 else torch.int32)
            found.append([t.cpu() for t in (ids, targets.log_p_BTK.half(), targets.log_rest_BT.half())])
            del log_p, targets  # before the teacher makes the next ones
            yield len(numbers[start : start + batch])
        ids, log_p, log_rest = (torch.cat(tensors) for tensors in zip(*found, strict=True))
        tensors = {"ids": ids, "log_p": log_p, "log_rest": log_rest}
        save_tensors(tensors, self._path(part), {"windows": json.dumps(numbers)})

    def read(self, numbers: Sequence[int], device: torch.device) -> TopTargets:
        """The targets of windows, in the order given."""
        found = [self._row(self._place[number]) for number in numbers]
        ids, log_p, log_rest = (torch.stack(tensors).to(device) for tensors in zip(*found, strict=True))
        return TopTargets(ids.long(), log_p.float(), log_rest.float())

    def _row(self, place: int) -> tuple[Tensor, Tensor, Tensor]:
        part, row = divmod(place, PART)
        file = self._open(part)
        ids, log_p, log_rest = (file.get_slice(name)[row] for name in ("ids", "log_p", "log_rest"))
        return ids.int(), log_p, log_rest

    def _open(self, part: int) -> Any:
        if part not in self._files:
            self._files[part] = safe_open(self._path(part), framework="pt")
            if len(self._files) > OPEN:
                self._files.popitem(last=False)
        self._files.move_to_end(part)
        return self._files[part]
