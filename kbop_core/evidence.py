"""Owns how evidence is stored: the running average of one shard's gradients, in two bytes a weight or in one.

Refuses to know what it is evidence for (kbop.py). m ← β m + (1 − β) g is kept as S = m / f with f = Π β, so that decay
touches one number instead of every weight and cannot be lost to rounding (a bfloat16 times 0.997 rounds back to
itself); f is KBOP's, equal for all layers. When f has become small, S is multiplied by a power of two, which is exact.

| store | bytes a weight | rounding of S |
|---|---|---|
| `bfloat16` | 2 | 8 significant bits |
| `int8` | 1 + 4/64 | 1/127 of the largest |S| among 64 neighbours in a row |
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

EvidenceKind = Literal["bfloat16", "int8"]
#: Weights of a row that share a block scale in int8.
BLOCK = 64
#: Weights whose int8 evidence is decoded at a time while a gradient is added: 64 MiB in float32.
AT_ONCE = 2**24
#: Block scales up to this count as 0: the inverse of a smaller one is no float32.
LEAST_SCALE = 2.0**-126


class Evidence(Protocol):
    """S of one shard, (R, I)."""

    def add(self, gradient_RI: Tensor, gain: float) -> None:
        """S ← S + gain · gradient; the gradient may be overwritten."""
        ...

    def values(self) -> Tensor:
        """S as a new float32 tensor (R, I)."""
        ...

    def multiply(self, factor: float) -> None:
        """S ← factor · S; exact for powers of two while nothing underflows, and for 0."""
        ...

    def multiply_at(self, places: Tensor, factor: float) -> None:
        """S ← factor · S at flat places, int64, each once; |factor| ≤ 1. int8 rounds: codes of 1 and 2 stay whole."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps; aliased, to be copied into when one is loaded."""
        ...


def make_evidence(kind: EvidenceKind, rows: int, columns: int, device: torch.device) -> Evidence:
    """Zero evidence (R, I).

    Raises:
        ValueError: an unknown kind.
    """
    if kind == "bfloat16":
        return _BrainFloat(rows, columns, device)
    if kind == "int8":
        return _BlockInt8(rows, columns, device)
    raise ValueError(f"evidence is {kind!r}; legal: 'bfloat16' (2 bytes a weight), 'int8' (1.06)")


class _BrainFloat:
    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.stored = torch.zeros(rows, columns, dtype=torch.bfloat16, device=device)

    def add(self, gradient_RI: Tensor, gain: float) -> None:
        self.stored.copy_(gradient_RI.float().mul_(gain).add_(self.stored))

    def values(self) -> Tensor:
        return self.stored.float()

    def multiply(self, factor: float) -> None:
        self.stored.mul_(factor)

    def multiply_at(self, places: Tensor, factor: float) -> None:
        self.stored.view(-1)[places] *= factor

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.stored}


class _BlockInt8:
    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.columns = columns
        blocks = -(-columns // BLOCK)
        self.codes = torch.zeros(rows, columns, dtype=torch.int8, device=device)
        self.scales = torch.zeros(rows, blocks, dtype=torch.float32, device=device)

    def add(self, gradient_RI: Tensor, gain: float) -> None:
        rows = max(1, AT_ONCE // max(1, self.columns))
        for start in range(0, len(gradient_RI), rows):
            self._add_rows(slice(start, start + rows), gradient_RI[start : start + rows], gain)

    def _add_rows(self, rows: slice, gradient_RI: Tensor, gain: float) -> None:
        codes, scales = self.codes[rows], self.scales[rows]
        whole = _decoded(codes, scales).add_(gradient_RI.float(), alpha=gain)
        tail = scales.shape[1] * BLOCK - self.columns
        padded = F.pad(whole, (0, tail)) if tail else whole
        blocks = padded.view(*scales.shape, BLOCK)
        torch.amax(blocks.abs(), dim=-1, out=scales)
        scales /= 127.0
        inverse = torch.where(scales > LEAST_SCALE, 1.0 / scales, 0.0)
        fresh = (blocks * inverse.unsqueeze(-1)).round_().clamp_(-127, 127)
        codes.copy_(fresh.view(padded.shape)[:, : self.columns])

    def values(self) -> Tensor:
        return _decoded(self.codes, self.scales)

    def multiply(self, factor: float) -> None:
        self.scales.mul_(factor)

    def multiply_at(self, places: Tensor, factor: float) -> None:
        codes = self.codes.view(-1)
        codes[places] = (codes[places] * factor).round().to(torch.int8)

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scales": self.scales}


def _decoded(codes_RI: Tensor, scales_RB: Tensor) -> Tensor:
    """codes × the scale of their block, float32 (R, I)."""
    return codes_RI.float().mul_(scales_RB.repeat_interleave(BLOCK, dim=1)[:, : codes_RI.shape[1]])
