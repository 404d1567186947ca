"""Owns how many flips are reversals: flips that give a weight back the sign it had when training began.

A run whose flips are mostly reversals only oscillates. Counted on a sample of rows (every row of layers with fewer
than 2·`SAMPLE`), whose first signs are kept: 1/8 byte for each sampled weight. The sample is the same for every number
of ranks. Changes no sign.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: A tall layer has at least so many watched rows and fewer than twice as many: of 4096, at most 0.001 bytes a weight.
SAMPLE = 16


class Reversals:
    """First signs of the sampled rows among one rank's rows of a layer.

    Args:
        bits: uint8 (R, W), this rank's rows, as training finds them.
        first: number of the first of them in the layer.
        height: rows of the layer.

    Attributes:
        start: uint8 (S, W), first signs of the sampled rows.
        before: sampled rows of lower ranks.
        total: sampled rows of the layer.
    """

    def __init__(self, bits: Tensor, first: int, height: int) -> None:
        self._stride = max(1, height // SAMPLE)
        self._offset = -first % self._stride
        self.before = -(-first // self._stride)
        self.total = -(-height // self._stride)
        self.start = self._sampled(bits).clone()

    def _sampled(self, bits: Tensor) -> Tensor:
        return bits[self._offset :: self._stride]

    def count(self, bits: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """Of flips about to be made: how many hit sampled rows, and how many of those are reversals, int64 (2,).

        Args:
            bits: uint8 (R, W), before the flips.
            row, column: int64 (F,), places within this rank's rows.
        """
        sampled = (row - self._offset) % self._stride == 0
        row, column = row[sampled], column[sampled]
        changed = self._sampled(bits) ^ self.start
        byte = changed[(row - self._offset) // self._stride, column // 8].long()
        reversed_ = (byte >> (column % 8)) & 1
        return torch.stack([sampled.sum(), reversed_.sum()])
