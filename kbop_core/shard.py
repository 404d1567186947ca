"""Owns who holds which rows, and the collectives KBOP needs. Refuses to know what the numbers mean.

Rows of a layer are dealt in equal blocks of ⌈O/N⌉; the last blocks may be short or empty (O < N). One rank uses the
same code: its collectives return what they are given.

Gradients are reduce-scattered as an all-to-all and a sum by the owner: every part is rounded to the wire's dtype once
and summed in float32 in the order of the ranks, so that bfloat16 on the wire is not bfloat16 in the sum, and a run
can be repeated bit by bit. (ZeRO++, arXiv:2306.10209, reduces quantised gradients the same way. gloo's own
reduce-scatter is an all-reduce whose rest is thrown away: 2.3 times slower at equal dtype, `make bench-scaling`.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kbop_core.phases import Phases


@dataclass(frozen=True)
class Gang:
    """The ranks that train one model together.

    Attributes:
        rank: ours, 0 ≤ rank < size.
        size: number of ranks.
        group: the process group of the collectives; None with one rank.
        wire: dtype in which gradients travel to their owners; with one rank nothing travels and nothing is rounded.
        phases: where the time spent waiting for other ranks is counted.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    wire: torch.dtype = torch.bfloat16
    phases: Phases = field(default_factory=Phases, compare=False)

    def rows(self, total: int) -> slice:
        """The rows of a layer of `total` rows that this rank owns; may be empty."""
        block = self.block(total)
        return slice(min(self.rank * block, total), min((self.rank + 1) * block, total))

    def block(self, total: int) -> int:
        """Rows in a full block: ⌈total/size⌉."""
        return -(-total // self.size)

    def reduce_scatter_rows(self, grad_OI: Tensor) -> Callable[[], Tensor]:
        """Start summing a (O, I) tensor of any floating dtype over ranks.

        Returns:
            A call that waits and gives the rows we own, (R, I), float32; at one rank the tensor itself.
        """
        if self.size == 1:
            return lambda: grad_OI
        total, width = grad_OI.shape
        block = self.block(total)
        sent = F.pad(grad_OI.to(self.wire), (0, 0, 0, block * self.size - total))
        received = torch.empty_like(sent)
        work = dist.all_to_all_single(received, sent, group=self.group, async_op=True)
        mine = self.rows(total)

        def finish() -> Tensor:
            nonlocal sent
            with self.phases.phase("communication"):
                work.wait()
            del sent  # the collective may read it until here
            parts = received.view(self.size, block, width)[:, : mine.stop - mine.start]
            total = parts[0].to(torch.float32, copy=True)
            for part in parts[1:]:  # not `sum(dtype=float32)`, which makes a float32 copy of all parts first
                total += part
            return total

        return finish

    def all_gather(self, part: Tensor) -> list[Tensor]:
        """Every rank's tensor of the same shape and dtype, in rank order; at one rank the tensor itself."""
        if self.size == 1:
            return [part]
        whole = torch.empty(self.size * part.numel(), dtype=part.dtype, device=part.device)  # gloo wants it flat
        with self.phases.phase("communication"):
            dist.all_gather_into_tensor(whole, part.reshape(-1), group=self.group)
        return [piece.view(part.shape) for piece in whole.split(part.numel())] if part.numel() else [part] * self.size

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            with self.phases.phase("communication"):
                dist.all_reduce(value, group=self.group)
        return value

    def max(self, value: Tensor) -> Tensor:
        """Elementwise maximum over ranks, in place."""
        if self.size > 1:
            with self.phases.phase("communication"):
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
