"""Owns the way of a batch through the decoder blocks, one block at a time: what each is called with.

Refuses to change any block. A block's output is the next one's input, so a walk over L blocks costs L calls and not
L²/2, and at any time only one block has to be where it can run. What else a block is called with (positions, masks,
which may differ from block to block) is recorded in one pass of the model whose blocks, but for the first, hand on what
they are given. Between its blocks a batch can wait in host memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from kbop_core.errors import UnsupportedModel
from kbop_core.lazy import untouched

#: Arguments of one call of a block.
BlockCall = tuple[tuple[Any, ...], dict[str, Any]]
#: Name of the argument that holds the hidden states where it is not the first one.
HIDDEN = "hidden_states"
#: What to do about a model that cannot be walked.
NO_CHAIN = "its blocks cannot be fitted one after the other: use a model whose decoder is a chain of blocks"
#: Largest error of a walk's last output, of each channel's own norm; and of the largest channel's, for silent ones.
CHANNEL_ERROR, SILENT_ERROR = 1e-2, 1e-5


class _LastBlockReached(Exception):
    """Ends a pass of the model before its head: logits of all positions can be larger than the model."""


class BlockStream:
    """One batch in front of one block of one model.

    Attributes:
        hidden: what the next block reads, (B, T, d), where the stream waits.
        device: where blocks run.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, blocks: Sequence[str], ids_BT: Tensor, on_host: bool = False) -> None:
        """Stand in front of the first block.

        Args:
            model: in eval mode; not changed.
            blocks: names of all its decoder blocks, in the order they run.
            ids_BT: token ids, int64.
            on_host: whether to wait in host memory.

        Raises:
            UnsupportedModel: the blocks are not called once each, in this order.
        """
        self._calls: dict[str, BlockCall] = {}
        with _handing_on(model, blocks, self._calls), suppress(_LastBlockReached):
            model(input_ids=ids_BT, use_cache=False)
        if list(self._calls) != list(blocks):
            raise UnsupportedModel(
                f"{type(model).__name__} calls {len(self._calls)} of its {len(blocks)} blocks, or in another order",
                NO_CHAIN,
            )
        first = _hidden(self._calls[blocks[0]])
        self.device, self._on_host = first.device, on_host
        self._calls = {name: _without_hidden(call) for name, call in self._calls.items()}
        self._wait(first)

    def _wait(self, hidden: Tensor) -> None:
        self.hidden = hidden.cpu() if self._on_host else hidden

    def call(self, block: str) -> BlockCall:
        """What `block`, the next one, is called with."""
        args, kwargs = self._calls[block]
        hidden = self.hidden.to(self.device)
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {HIDDEN: hidden})

    @torch.no_grad()
    def advance(self, model: nn.Module, block: str) -> None:
        """Pass the next block, as it now is in `model`."""
        self._wait(block_output(model.get_submodule(block), self.call(block)))


class Calls(Sequence[tuple[BlockCall, BlockCall]]):
    """What the same block of two models is called with, batch after batch; each pair is made when it is asked for."""

    def __init__(self, streams: Sequence[tuple[BlockStream, BlockStream]], block: str) -> None:
        self._streams, self._block = streams, block

    def __len__(self) -> int:
        return len(self._streams)

    def __getitem__(self, place: Any) -> Any:
        ours, theirs = self._streams[place]
        return ours.call(self._block), theirs.call(self._block)


def block_output(block: nn.Module, call: BlockCall) -> Tensor:
    """The hidden states that a block gives, (B, T, d)."""
    return _first(block(*call[0], **call[1]))


def _first(out: Any) -> Tensor:
    hidden: Tensor = out[0] if isinstance(out, tuple) else out
    return hidden


def check_chain(model: nn.Module, blocks: Sequence[str], ids_BT: Tensor) -> None:
    """Walk a model and compare: each channel of the last block must be what it is in an ordinary pass.

    Raises:
        UnsupportedModel: something besides the hidden states passes from block to block.
    """
    stream = BlockStream(model, blocks, ids_BT)
    for block in blocks:
        stream.advance(model, block)
    given: list[Tensor] = []

    def see(_: nn.Module, __: Any, out: Any) -> None:
        given.append(_first(out))
        raise _LastBlockReached

    handle = model.get_submodule(blocks[-1]).register_forward_hook(see)
    try:
        with torch.no_grad(), suppress(_LastBlockReached):
            model(input_ids=ids_BT, use_cache=False)
    finally:
        handle.remove()
    wanted_BTd = given[0].float()
    error, size = (x.flatten(0, -2).norm(dim=0) for x in (stream.hidden.to(wanted_BTd.device) - wanted_BTd, wanted_BTd))
    if bool((error > CHANNEL_ERROR * size + SILENT_ERROR * size.max()).any()):
        raise UnsupportedModel(
            f"the decoder blocks of {type(model).__name__} hand on more than hidden states",
            NO_CHAIN,
        )


def _hidden(call: BlockCall) -> Tensor:
    hidden: Tensor = call[0][0] if call[0] else call[1][HIDDEN]
    return hidden


def _without_hidden(call: BlockCall) -> BlockCall:
    args, kwargs = call
    return ((None, *args[1:]), kwargs) if args else (args, kwargs | {HIDDEN: None})


@contextmanager
def _handing_on(model: nn.Module, blocks: Sequence[str], calls: dict[str, BlockCall]) -> Iterator[None]:
    """Each decoder block notes what it is called with; only the first one computes, and the last one ends the pass."""
    modules = {name: model.get_submodule(name) for name in blocks}
    first, last, form = modules[blocks[0]], modules[blocks[-1]], list[Any]()

    def stand_in(name: str, module: nn.Module) -> Any:
        real = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            calls[name] = (args, kwargs)
            if module is last:
                raise _LastBlockReached
            if module is first:
                form.append(real(*args, **kwargs))
                return form[0]
            hidden = _hidden(calls[name])
            return (hidden, *form[0][1:]) if form and isinstance(form[0], tuple) else hidden

        return forward

    for name, module in modules.items():
        module.__dict__["forward"] = stand_in(name, module)
    try:
        with untouched(model, blocks[1:]):
            yield
    finally:
        for module in modules.values():
            del module.__dict__["forward"]
