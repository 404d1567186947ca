"""Owns counting without trusting the code that is measured: bytes given to collectives, and bytes of live tensors."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: Collective → how often the bytes of which argument cross the wire: with N ranks a rank sends (N−1)/N of that. An
#: all-reduce is a reduce-scatter and an all-gather.
_COLLECTIVES: dict[str, tuple[str, int]] = {
    "all_reduce": ("tensor", 2),
    "reduce": ("tensor", 1),
    "broadcast": ("tensor", 1),
    "all_to_all_single": ("input", 1),
    "reduce_scatter_tensor": ("input", 1),
    "all_gather_into_tensor": ("output_tensor", 1),
    "all_gather": ("tensor_list", 1),
    "reduce_scatter": ("input_list", 1),
}
#: Place of those arguments among the positional ones.
_PLACES = {"input": 1, "input_list": 1}


class Wire:
    """Bytes given to torch.distributed from now on, by label.

    Attributes:
        label: what is counted now belongs to it.
        bytes: label → collective → bytes, as `_COLLECTIVES` weighs them.
    """

    def __init__(self) -> None:
        self.label = "other"
        self.bytes: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for name, (argument, times) in _COLLECTIVES.items():
            setattr(dist, name, self._counted(name, getattr(dist, name), argument, times))

    def _counted(self, name: str, function: Callable[..., Any], argument: str, times: int) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            value: Any = kwargs[argument] if argument in kwargs else args[_PLACES.get(argument, 0)]
            tensors: list[Tensor] = [value] if isinstance(value, Tensor) else list(value)
            label = "signs" if name == "all_to_all_single" else self.label  # DeepSpeed uses none here
            self.bytes[label][name] += times * sum(t.nbytes for t in tensors)
            return function(*args, **kwargs)

        return counted

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Count for another label within the block."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def total(self, label: str) -> int:
        """Bytes counted for a label."""
        return sum(self.bytes[label].values())

    def clear(self) -> None:
        """Start anew."""
        self.bytes.clear()


class LiveTensors(TorchDispatchMode):
    """Bytes of tensors made while it is active and not yet freed.

    Attributes:
        live: now.
        peak: most at a time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.live -= size
