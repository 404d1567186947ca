"""Counts the bytes of tensors that code makes while it runs: what the plan's formulas are compared with.

`made_by` sees what PyTorch's operators return, on any device alike; `allocated_by` all that the CPU's allocator gives
out, also what an operator makes inside: copies of places as int64, and of a dtype that a CPU converts first.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made under it: those alive now, and the most that were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {a.untyped_storage()._cdata for a in tree_iter((args, kwargs)) if isinstance(a, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self.known | given:
                size = tensor.untyped_storage().nbytes()
                self.known.add(key)
                self.now += size
                weakref.finalize(tensor.untyped_storage(), self._gone, key, size)
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def made_by(work: Callable[[], object]) -> int:
    """Most bytes of tensors alive at once that operators returned."""
    with LiveBytes() as live:
        work()
    return live.peak


def allocated_by(work: Callable[[], object]) -> int:
    """Most bytes that the CPU's allocator had given out at once."""
    gc.disable()  # what an earlier count saw must not be freed in this one
    try:
        with profile(profile_memory=True) as run:
            work()
    finally:
        gc.enable()
    events = sorted((e for e in run.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    now = peak = 0
    for event in events:
        now += event.nbytes()
        peak = max(peak, now)
    return peak
