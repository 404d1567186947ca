"""Owns state that is spread over ranks: named tensors of which each rank holds a range of rows, on disk and back.

A rank writes one safetensors file with its ranges; its header says where they begin and how long the whole is. Who
reads asks for any range of a whole, whoever wrote the pieces: that is all there is to another number of ranks.
Refuses to know what the tensors mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from kbop_core.checkpoint import write_tensors
from kbop_core.errors import BadCheckpoint


@dataclass(frozen=True)
class Slice:
    """Rows `start` … of a tensor that has `total` rows in all.

    Attributes:
        rows: (R, …), R ≥ 0.
        start: first row's place in the whole.
        total: rows of the whole.
    """

    rows: Tensor
    start: int
    total: int

    @classmethod
    def whole(cls, tensor: Tensor) -> Slice:
        """All rows there are."""
        return cls(tensor, 0, tensor.shape[0])


def copy_to_host(slices: Mapping[str, Slice]) -> dict[str, Slice]:
    """The same values in CPU memory of their own: what comes after may change the originals."""
    return {n: Slice(s.rows.detach().to("cpu", copy=True).contiguous(), s.start, s.total) for n, s in slices.items()}


def write_slices(slices: Mapping[str, Slice], path: Path) -> None:
    """Write one rank's ranges; empty ones are left out."""
    some = {name: s for name, s in slices.items() if s.rows.shape[0]}
    header = {name: [s.start, s.total] for name, s in some.items()}
    write_tensors({name: s.rows for name, s in some.items()}, path, {"slices": json.dumps(header)})


class SliceReader:
    """Ranges of tensors that several files hold together.

    Args:
        files: one per rank that wrote.

    Raises:
        BadCheckpoint: a file whose header says nothing about its ranges.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._pieces: dict[str, list[tuple[int, int, Path]]] = {}
        self._totals: dict[str, int] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                header = (file.metadata() or {}).get("slices")
                if header is None:
                    raise BadCheckpoint(f"{path.name} does not say which rows it holds", "remove the checkpoint")
                for name, (start, total) in json.loads(header).items():
                    rows = int(file.get_slice(name).get_shape()[0])
                    self._pieces.setdefault(name, []).append((start, start + rows, path))
                    self._totals[name] = total

    @property
    def names(self) -> set[str]:
        """Tensors there are."""
        return set(self._pieces)

    def total(self, name: str) -> int:
        """Rows of a whole tensor; KeyError when it is not there."""
        return self._totals[name]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start … stop−1 on the CPU.

        Raises:
            BadCheckpoint: the tensor is not there, or not all of these rows.
        """
        found: list[Tensor] = []
        at = start
        for first, end, path in sorted(self._pieces.get(name, [])):
            if first <= at < min(end, stop):
                with safe_open(path, framework="pt") as file:
                    # A copy: what get_slice gives may keep the whole file mapped.
                    found.append(file.get_slice(name)[at - first : min(end, stop) - first].clone())
                at = min(end, stop)
        if at < stop or name not in self._pieces:
            raise BadCheckpoint(f"rows {at} … {stop - 1} of {name} are in no file", "use another checkpoint")
        return torch.cat(found) if found else self._none(name)

    def read_whole(self, name: str) -> Tensor:
        """All rows."""
        return self.read(name, 0, self._totals.get(name, 1))

    def _none(self, name: str) -> Tensor:
        """No rows, of the right width and dtype."""
        _, _, path = self._pieces[name][0]
        with safe_open(path, framework="pt") as file:
            none: Tensor = file.get_slice(name)[0:0].clone()
            return none
