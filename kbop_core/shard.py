"""Owns who holds which rows, and the three collectives KBOP needs. Refuses to know what the numbers mean.

Rows of a layer are dealt in equal blocks of ⌈O/N⌉; the last blocks may be short or empty (O < N). One rank uses the
same code: its collectives return what they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Gang:
    """The ranks that train one model together.

    Attributes:
        rank: ours, 0 ≤ rank < size.
        size: number of ranks.
        group: the process group of the collectives; None with one rank.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def rows(self, total: int) -> slice:
        """The rows of a layer of `total` rows that this rank owns; may be empty."""
        block = self.block(total)
        return slice(min(self.rank * block, total), min((self.rank + 1) * block, total))

    def block(self, total: int) -> int:
        """Rows in a full block: ⌈total/size⌉."""
        return -(-total // self.size)

    def reduce_scatter_rows(self, grad_OI: Tensor) -> Callable[[], Tensor]:
        """Start summing a (O, I) tensor over ranks; the returned call waits and gives the rows we own, (R, I)."""
        if self.size == 1:
            return lambda: grad_OI
        total = grad_OI.shape[0]
        padded = F.pad(grad_OI, (0, 0, 0, self.block(total) * self.size - total))
        own = torch.empty_like(padded[: self.block(total)])
        work = dist.reduce_scatter_tensor(own, padded, group=self.group, async_op=True)
        mine = self.rows(total)

        def finish() -> Tensor:
            work.wait()
            return own[: mine.stop - mine.start]

        return finish

    def all_gather(self, part: Tensor) -> list[Tensor]:
        """Every rank's tensor of the same shape and dtype, in rank order; at one rank the tensor itself."""
        if self.size == 1:
            return [part]
        whole = torch.empty(self.size * part.numel(), dtype=part.dtype, device=part.device)  # gloo wants it flat
        dist.all_gather_into_tensor(whole, part.reshape(-1), group=self.group)
        return [piece.view(part.shape) for piece in whole.split(part.numel())] if part.numel() else [part] * self.size

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value, group=self.group)
        return value

    def max(self, value: Tensor) -> Tensor:
        """Elementwise maximum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group)
        return value

    def gather_rows(self, parts: Sequence[Tensor], totals: Sequence[int]) -> list[Tensor]:
        """Whole (O, …) tensors from every rank's own rows, all tensors in one collective.

        Args:
            parts: for each tensor our rows (R, …); equal dtype.
            totals: O of each tensor.
        """
        if self.size == 1:
            return list(parts)
        padded = [
            F.pad(p, (0, 0) * (p.dim() - 1) + (0, self.block(t) - p.shape[0]))
            for p, t in zip(parts, totals, strict=True)
        ]
        flat = self.all_gather(torch.cat([p.reshape(-1) for p in padded]))
        columns = [torch.split(f, [p.numel() for p in padded]) for f in flat]
        return [
            torch.cat([c[i] for c in columns]).view(-1, *p.shape[1:])[:t]
            for i, (p, t) in enumerate(zip(padded, totals, strict=True))
        ]
