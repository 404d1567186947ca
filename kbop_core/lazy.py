"""Owns weights that stay on disk: a model whose decoder blocks are loaded when they run and forgotten right after.

Refuses to change a weight. Embeddings, final norm and head are loaded once; a block's tensors are read from the
safetensors shards by name when it is called, so that at any time one block is in memory. A block can be held for a
while (`resident`), or for good (`keep`) because it is about to be changed. All three do nothing for ordinary models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kbop_core.errors import BadWeights, UnsupportedModel

#: What floating-point weights may be stored in: anything else needs more than a conversion.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Attribute of a lazy model that holds its `_Blocks`.
_ATTRIBUTE = "_kbop_lazy_blocks"
INDEX_FILE, WEIGHTS_FILE = "model.safetensors.index.json", "model.safetensors"


class ShardedWeights:
    """Tensors of a checkpoint folder by name, read one at a time.

    Args:
        folder: with model.safetensors, or its shards and their index.
        dtype: floating-point tensors are converted to it.
        device: where they go.
        prefix: of names in the model that files may leave out, as base models' files do ("model.").
        rename: name in the file → name in the model, for old files.

    Raises:
        BadWeights: no safetensors file, or an unreadable index.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        prefix: str = "",
        rename: Callable[[str], str] = lambda name: name,
    ) -> None:
        self.dtype, self.device, self.prefix = dtype, device, prefix
        index = folder / INDEX_FILE
        try:
            if index.is_file():
                shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                files = {str(name): folder / str(shard) for name, shard in shards.items()}
            else:
                with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
                    files = dict.fromkeys(file.keys(), folder / WEIGHTS_FILE)
        except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
            raise BadWeights(
                f"{folder.name}: no readable safetensors: {error}", "re-download the checkpoint"
            ) from error

        self.files = {rename(name): (name, path) for name, path in files.items()}

    def fill(self, module: nn.Module, name: str) -> None:
        """Give every parameter and stored buffer of a module the tensor of its name, on the device.

        Args:
            module: its tensors may be on "meta".
            name: of the module in its model.

        Raises:
            BadWeights: a tensor is missing, of another shape, in a quantized format, or in a file that is damaged.
        """
        self.fill_some(module, {own: f"{name}.{own}" for own in module.state_dict()})

    def fill_some(self, module: nn.Module, names: Mapping[str, str]) -> None:
        """The same for some of its tensors: name in the module → name in the model."""
        wanted: dict[Path, list[tuple[str, str]]] = {}
        for own, name in names.items():
            stored, path = self.find(name)
            wanted.setdefault(path, []).append((own, stored))
        for path, pairs in wanted.items():
            try:
                with safe_open(path, framework="pt") as file:
                    for own, stored in pairs:
                        _set(module, own, self._converted(stored, file.get_tensor(stored)))
            except (OSError, SafetensorError) as error:
                raise BadWeights(
                    f"{path.name}: not readable: {error}", "repair or re-download the checkpoint"
                ) from error

    def _converted(self, name: str, tensor: Tensor) -> Tensor:
        """A copy: a view would keep the whole file mapped, and what was read of it in memory, while it lives."""
        if not tensor.is_floating_point():
            return tensor.to(self.device, copy=True)
        if tensor.dtype not in FLOATS:
            raise BadWeights(f"{name} is stored as {tensor.dtype}", "give the model in bfloat16, float16 or float32")
        return tensor.to(self.device, self.dtype, copy=True)

    def find(self, name: str) -> tuple[str, Path]:
        """Name in the file, and the file, of a tensor of the model.

        Raises:
            BadWeights: there is none.
        """
        places = (self.files.get(n) for n in (name, name.removeprefix(self.prefix), self.prefix + name))
        found = next((place for place in places if place), None)
        if found is None:
            raise BadWeights(f"the checkpoint has no tensor {name}", "repair or re-download the checkpoint")
        return found


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    holder = module.get_submodule(owner)
    old = holder.get_parameter(last) if last in holder._parameters else holder.get_buffer(last)
    if old.shape != tensor.shape:
        raise BadWeights(
            f"{name} is {tuple(tensor.shape)} in the checkpoint and {tuple(old.shape)} in config.json",
            "repair or re-download the checkpoint",
        )
    if last in holder._parameters:
        holder._parameters[last] = nn.Parameter(tensor, requires_grad=False)
    else:
        holder._buffers[last] = tensor


class _Blocks:
    """Which blocks of a lazy model are on disk, and how often each is held."""

    def __init__(self, model: nn.Module, blocks: Sequence[str], weights: ShardedWeights) -> None:
        self.model, self.weights = model, weights
        self.holds, self.idle = dict.fromkeys(blocks, 0), frozenset[str]()
        self.hooks = {name: self._install(name) for name in blocks}

    def _install(self, name: str) -> list[Any]:
        block = self.model.get_submodule(name)

        def before(*_: Any) -> None:
            if name not in self.idle:
                self.take(name)

        def after(*_: Any) -> None:
            if name not in self.idle:
                self.release(name)

        return [block.register_forward_pre_hook(before), block.register_forward_hook(after, always_call=True)]

    def take(self, name: str) -> None:
        if not self.holds[name]:
            self.weights.fill(self.model.get_submodule(name), name)
        self.holds[name] += 1

    def release(self, name: str) -> None:
        self.holds[name] = max(0, self.holds[name] - 1)  # 0 already: taking it failed half-way
        if not self.holds[name]:
            _forget(self.model.get_submodule(name))

    def keep(self, name: str) -> None:
        self.take(name)
        for hook in self.hooks.pop(name):
            hook.remove()
        del self.holds[name]


def _forget(block: nn.Module) -> None:
    for module in block.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                module._buffers[name] = buffer.to("meta")


def make_lazy(model: nn.Module, blocks: Sequence[str], weights: ShardedWeights, tied: Sequence[str] = ()) -> None:
    """Load all of a model but its blocks, and make these load themselves when they are called.

    Args:
        model: parameters on "meta", buffers outside the state dict real.
        blocks: names of its decoder blocks.
        weights: of its checkpoint.
        tied: names of parameters that files leave out because they are others; the caller ties them again.

    Raises:
        BadWeights: a tensor is missing or of another shape.
        UnsupportedModel: a block shares a parameter with something outside it.
    """
    holders: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), set()).add(_block_of(name, blocks))
    if any(len(places) > 1 for places in holders.values()):
        raise UnsupportedModel(
            f"blocks of {type(model).__name__} share parameters with other parts", "load it whole: `offload`: none"
        )
    for name in model.state_dict():
        if name not in tied:
            weights.find(name)
    outside = [name for name in model.state_dict() if not _block_of(name, blocks) and name not in tied]
    weights.fill_some(model, dict(zip(outside, outside, strict=True)))
    for module in model.modules():  # outside the state dict: tables of positions
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None or buffer.is_meta else buffer.to(weights.device)
    object.__setattr__(model, _ATTRIBUTE, _Blocks(model, blocks, weights))


def _block_of(name: str, blocks: Sequence[str]) -> str:
    """The block that holds a parameter; "" outside them."""
    return next((block for block in blocks if name.startswith(block + ".")), "")


@contextmanager
def resident(model: nn.Module, block: str) -> Iterator[None]:
    """Hold a block in memory until the end of the `with`; ordinary models have theirs anyway."""
    lazy: _Blocks | None = getattr(model, _ATTRIBUTE, None)
    if lazy is None or block not in lazy.holds:
        yield
        return
    lazy.take(block)
    try:
        yield
    finally:
        lazy.release(block)


@contextmanager
def untouched(model: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """Until the end of the `with`, calls of these blocks load nothing: something stands in for them."""
    lazy: _Blocks | None = getattr(model, _ATTRIBUTE, None)
    if lazy is None:
        yield
        return
    lazy.idle = frozenset(blocks)
    try:
        yield
    finally:
        lazy.idle = frozenset()


def keep(model: nn.Module, block: str) -> None:
    """Load a block for good, because it is about to be changed; ordinary models have theirs anyway."""
    lazy: _Blocks | None = getattr(model, _ATTRIBUTE, None)
    if lazy is not None and block in lazy.holds:
        lazy.keep(block)


def blocks_on_disk(model: nn.Module) -> tuple[str, ...]:
    """Names of the blocks that load themselves when they are called; none in ordinary models."""
    lazy: _Blocks | None = getattr(model, _ATTRIBUTE, None)
    return tuple(lazy.holds) if lazy else ()
