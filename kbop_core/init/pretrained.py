"""Owns BNN Init from pretrained weights: walks the blocks and fits each layer to the inputs it will really see.

Refuses to know the fit itself (fit.py). Blocks are visited in forward order, and inside a block the layers in the order
they run, so that each is calibrated on activations of the already binary prefix, beside what the teacher's same layer
reads on the same text: later layers make up for earlier errors. Layers that read one tensor (q, k, v; gate, up) share
H and C.

If asked, each block, once its layers are fitted, learns as a whole what the teacher's gives (blockwise.py)
before the next one begins.

Ranks share the work: each measures H on its own windows, one all-reduce adds them, each fits its own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kbop_core.convert import BinaryEntry, ConversionPlan, binary_layers, linear_weight, to_binary
from kbop_core.init.blockwise import BlockEffort, reconstruct_block
from kbop_core.init.fit import FitEffort, fit_layer
from kbop_core.init.stream import BlockCall, BlockStream, Calls, check_chain
from kbop_core.lazy import blocks_on_disk, keep, resident
from kbop_core.shard import Gang

#: Called with (done, in all): a layer's fit counts one, so does a step of a block's reconstruction.
Progress = Callable[[int, int], None]
#: Another fit in place of fit.py's: weight (O, I), H (I, I), groups → signs (O, I), scales (O, G).
LayerFit = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class InitEffort:
    """How hard to try.

    Attributes:
        fit: how long to fit each layer, or another fit (a baseline's) to use instead.
        blockwise: how long to reconstruct each block after the fit of its layers; None: not at all.
    """

    fit: FitEffort | LayerFit = field(default_factory=FitEffort)
    blockwise: BlockEffort | None = None


@torch.no_grad()
def pretrained_init(
    model: nn.Module,
    teacher: nn.Module,
    plan: ConversionPlan,
    batches: Sequence[Tensor],
    effort: InitEffort | None = None,
    gang: Gang | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[str, float | None]:
    """Replace every layer of the plan by a fitted binary one, in place.

    Args:
        model: the pretrained model, in eval mode; its linear layers are consumed.
        teacher: another copy of it, not changed.
        plan: from plan_conversion(model).
        batches: this rank's calibration windows, int64 (B, T) each; at least one.
        effort: how long to fit layers and blocks.
        gang: the ranks; all must call, with equal weights.
        progress: told after each layer and each step.

    Returns:
        Block → its relative squared error after reconstruction, None where it was left as fitted (see
        `reconstruct_block`); empty when blocks are not reconstructed.

    Raises:
        ValueError: a rank without a calibration window; it would group the layers differently from the others.
        UnsupportedModel: the decoder blocks do not simply follow each other.
    """
    if not batches:
        raise ValueError("a rank has no calibration window; give each rank at least one")
    gang, effort, done = gang or Gang(), effort or InitEffort(), 0
    steps = effort.blockwise.steps if effort.blockwise else 0
    blocks = {block: {e.name: e for e in plan.binary if e.name.startswith(block + ".")} for block in plan.blocks}
    total = len(plan.binary) + steps * sum(map(bool, blocks.values()))
    errors: dict[str, float | None] = {}
    check_chain(teacher, plan.blocks, batches[0])
    streams = _streams(model, teacher, plan.blocks, batches)
    for block, entries in blocks.items():
        keep(model, block)
        with resident(teacher, block):
            calls = Calls(streams, block)
            for _ in _fit_layers((model, teacher), block, entries, calls, plan.group_size, effort.fit, gang):
                done += 1
                progress(done, total)
            if entries and effort.blockwise:
                layers = {name: layer for name, layer in binary_layers(model).items() if name in entries}
                pair = model.get_submodule(block), teacher.get_submodule(block)
                tell = partial(_tell, progress, done, total)
                errors[block] = reconstruct_block(pair[0], layers, pair[1], calls, effort.blockwise, gang, tell)
                done += steps
                if errors[block] is None:
                    progress(done, total)
            for ours, theirs in streams:
                ours.advance(model, block)
                theirs.advance(teacher, block)
    return errors


def _streams(
    model: nn.Module, teacher: nn.Module, blocks: Sequence[str], batches: Sequence[Tensor]
) -> list[tuple[BlockStream, BlockStream]]:
    """The student's and the teacher's stream of each batch; those of lazy models wait in host memory."""
    on_host = bool(blocks_on_disk(teacher))
    with resident(model, blocks[0]), resident(teacher, blocks[0]):
        return [
            (BlockStream(model, blocks, ids, on_host), BlockStream(teacher, blocks, ids, on_host)) for ids in batches
        ]


def _fit_layers(
    models: tuple[nn.Module, nn.Module],
    block: str,
    entries: dict[str, BinaryEntry],
    calls: Sequence[tuple[BlockCall, BlockCall]],
    group_size: int,
    fit: FitEffort | LayerFit,
    gang: Gang,
) -> Iterator[None]:
    """Fit the student's layers of a block in the order they run, beside the teacher's; yields after each."""
    model, teacher = models
    for stage in _stages(model, block, entries, calls[0][0]) if entries else ():
        moments = _input_moments(model, teacher, block, stage[0], calls, gang)
        for entry in stage:
            _fit_entry(model, entry, group_size, moments, fit, gang)
            yield


def _tell(progress: Progress, before: int, total: int, steps: int) -> None:
    progress(before + steps, total)


@contextmanager
def _seen_inputs(model: nn.Module, names: Sequence[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: see(name, args[0])

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(n)) for n in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stages(model: nn.Module, block: str, entries: dict[str, BinaryEntry], call: BlockCall) -> list[list[BinaryEntry]]:
    """The block's layers in the order they run, those that read one tensor together; layers never run come last,
    alone.
    """
    order: list[tuple[str, Tensor]] = []
    with _seen_inputs(model, list(entries), lambda name, x: order.append((name, x))):
        model.get_submodule(block)(*call[0], **call[1])
    stages: list[list[BinaryEntry]] = []
    for i, (name, x) in enumerate(order):
        if i and order[i - 1][1] is x:
            stages[-1].append(entries[name])
        else:
            stages.append([entries[name]])
    seen = {name for name, _ in order}
    return stages + [[e] for name, e in entries.items() if name not in seen]


def _input_moments(
    model: nn.Module,
    teacher: nn.Module,
    block: str,
    entry: BinaryEntry,
    calls: Sequence[tuple[BlockCall, BlockCall]],
    gang: Gang,
) -> tuple[Tensor, Tensor]:
    """H = Σ x xᵀ and C = Σ x tᵀ of a layer's inputs over all ranks' windows, (I, I) float32, over H's mean diagonal."""
    width = entry.in_features
    device = linear_weight(model.get_submodule(entry.name)).device
    moments = torch.zeros(2, width, width, device=device)
    for ours, theirs in calls:
        x, t = _layer_input(model, block, entry, ours), _layer_input(teacher, block, entry, theirs)
        if x is None or t is None or x.shape != t.shape:
            continue  # an expert that this text does not reach, or that gets other tokens than the teacher's
        moments[0].addmm_(x.t(), x)
        moments[1].addmm_(x.t(), t)
    gang.sum(moments)
    level = moments[0].diagonal().mean()
    own, cross = moments / level if level > 0 else moments
    return own, cross


def _layer_input(model: nn.Module, block: str, entry: BinaryEntry, call: BlockCall) -> Tensor | None:
    """What a layer reads in one call of its block, (tokens, I) float32; None when it is not reached."""
    caught: list[Tensor] = []
    with _seen_inputs(model, [entry.name], lambda _, x: caught.append(x)):
        model.get_submodule(block)(*call[0], **call[1])
    return caught[0].reshape(-1, entry.in_features).float() if caught else None


def _fit_entry(
    model: nn.Module,
    entry: BinaryEntry,
    group_size: int,
    moments: tuple[Tensor, Tensor],
    fit: FitEffort | LayerFit,
    gang: Gang,
) -> None:
    weight_OI = linear_weight(model.get_submodule(entry.name)).detach().float()
    mine = gang.rows(entry.out_features)
    if callable(fit):
        signs, scales = fit(weight_OI[mine], moments[0], entry.groups)
    else:
        signs, scales = fit_layer(weight_OI[mine], moments[0], entry.groups, fit, moments[1])
    layer = to_binary(model, entry, group_size, trainable=True)
    whole_signs, whole_scales = gang.gather_rows([signs, scales], [entry.out_features] * 2)
    layer.set_signs(whole_signs)
    layer.weight_scale.copy_(whole_scales)
