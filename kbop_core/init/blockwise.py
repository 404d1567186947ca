"""Owns block-wise reconstruction: one decoder block of the student learns to give what the teacher's block gives.

Refuses to know how the block was started (pretrained.py) and how flips are decided (kbop.py). The block reads what the
student's earlier, finished blocks give, and aims at the teacher's output on the teacher's own input, so that it also
repairs what came before it:

    minimise  Σ ‖f_b(x) − t‖² / Σ ‖t − t₀‖²        x student's input, t teacher's output, t₀ teacher's input

Signs move by KBOP; scales, norms and biases by AdamW; matrices that stay real do not. No head, no logits, no gradient
beyond the block. Ranks read their own windows and sum their gradients.

What it is worth: `make bench-quality`, row `quick` beside `bnn_init` (docs/quality.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from kbop_core.full_precision import SCALE_LR, parameter_groups
from kbop_core.init.stream import BlockCall, block_output
from kbop_core.kbop import KBOP
from kbop_core.layers import BinaryLayer
from kbop_core.schedules import FlipSchedule, warmup_cosine
from kbop_core.shard import Gang


@dataclass(frozen=True)
class BlockEffort:
    """How long and how fast to reconstruct.

    Attributes:
        steps: of each block, ≥ 1; every step reads one batch of calibration windows on each rank.
        flip_rate: peak share of each layer's signs flipped in a step, 0 … 0.5.
        scale_lr: peak AdamW learning rate of scales, a share of their size (full_precision.py).
        other_lr: of norms and biases, likewise.
        warmup: share of the steps in which all rates rise.
        clip: largest norm of the gradient of scales, norms and biases.
    """

    steps: int = 400
    flip_rate: float = 0.01
    scale_lr: float = SCALE_LR
    other_lr: float = 0.01
    warmup: float = 0.05
    clip: float = 1.0

    def __post_init__(self) -> None:
        legal = {"steps": (1, 10**6), "flip_rate": (0.0, 0.5), "warmup": (0.0, 1.0), "clip": (0.0, math.inf)}
        for name, (least, most) in (legal | dict.fromkeys(("scale_lr", "other_lr"), (0.0, 1.0))).items():
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; legal: {least} … {most}")

    @property
    def warmup_steps(self) -> int:
        """Steps in which all rates rise."""
        return max(1, round(self.warmup * self.steps))

    @property
    def flips(self) -> FlipSchedule:
        """The share of flips over the steps."""
        return FlipSchedule(self.flip_rate, self.steps, self.warmup_steps)


def reconstruct_block(
    block: nn.Module,
    layers: Mapping[str, BinaryLayer],
    teacher_block: nn.Module,
    calls: Sequence[tuple[BlockCall, BlockCall]],
    effort: BlockEffort,
    gang: Gang,
    progress: Callable[[int], None],
) -> float | None:
    """Train one block, in place.

    Args:
        block: the student's, its layers binary; left in its own dtype, trained in float32.
        layers: name → its binary layers, at least one.
        teacher_block: the same block of the teacher.
        calls: for each of this rank's batches, what the student hands to its block and the teacher to its own.
        effort: how long.
        gang: the ranks; all must call.
        progress: told the steps done, after each.

    Returns:
        The block's relative squared error as it now is, over all ranks' batches, unit 1; one that did not get better is
        put back. None when the text does not reach every layer exactly once per call (experts): it was not tried.
    """
    if not _reached(block, layers, calls, gang):
        return None
    before = {name: tensor.clone() for name, tensor in _tensors(block)}
    targets, level = _targets(teacher_block, calls, gang)

    def error(place: int) -> Tensor:
        return (block_output(block, _cast(calls[place][0])) - targets[place]).square().mean() / level

    block.float()
    started = _mean_error(error, len(calls), gang)
    try:
        _train(block, KBOP(layers, effort.flips, gang=gang), error, len(calls), effort, progress)
    finally:
        for layer in layers.values():
            layer.gradient_sink = None
    for name, tensor in _tensors(block):
        tensor.data = tensor.data.to(before[name].dtype).to(tensor.dtype)  # what the stored student will hold
    ended = _mean_error(error, len(calls), gang)
    for name, tensor in _tensors(block):
        tensor.data = tensor.data.to(before[name].dtype) if ended < started else before[name]
    return min(ended, started)


def _tensors(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(block.named_parameters(), block.named_buffers())


@torch.no_grad()
def _mean_error(error: Callable[[int], Tensor], batches: int, gang: Gang) -> float:
    """Over all batches of all ranks."""
    mean = torch.stack([error(place) for place in range(batches)]).mean()
    return float(gang.sum(mean.reshape(1))) / gang.size


@torch.enable_grad()
def _train(
    block: nn.Module,
    kbop: KBOP,
    error: Callable[[int], Tensor],
    batches: int,
    effort: BlockEffort,
    progress: Callable[[int], None],
) -> None:
    """Minimise error(place), the batches in a new random order each time."""
    small = [(n, p) for n, p in block.named_parameters() if p.dim() < 2 or n.endswith("weight_scale")]
    groups = parameter_groups(small, effort.scale_lr, effort.other_lr)
    peaks = [float(group["lr"]) for group in groups]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    generator, order = torch.Generator().manual_seed(0), list[int]()
    learning = {name: p.requires_grad for name, p in block.named_parameters()}
    block.requires_grad_(False)
    for _, parameter in small:
        parameter.requires_grad_(True)
    for step in range(effort.steps):
        order = order or torch.randperm(batches, generator=generator).tolist()
        error(order.pop()).backward()
        _average([p for _, p in small], kbop.gang)
        nn.utils.clip_grad_norm_([p for _, p in small], effort.clip)
        kbop.step()
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * warmup_cosine(step, effort.steps, effort.warmup_steps)
        optimizer.step()
        optimizer.zero_grad()
        progress(step + 1)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(learning[name])


def _targets(
    teacher_block: nn.Module, calls: Sequence[tuple[BlockCall, BlockCall]], gang: Gang
) -> tuple[list[Tensor], float]:
    """The teacher's outputs, float32, and the mean square of what its block adds, over all ranks."""
    targets, sums = [], torch.zeros(2, dtype=torch.float64)
    for _, (args, kwargs) in calls:
        target = block_output(teacher_block, (args, kwargs)).detach().float()
        added = target - (args[0] if args else kwargs["hidden_states"]).float()
        sums += torch.tensor([float(added.square().sum()), float(added.numel())], dtype=torch.float64)
        targets.append(target)
    sums = gang.sum(sums.to(targets[0].device)).cpu()
    return targets, float(sums[0] / sums[1]) or 1.0


def _reached(
    block: nn.Module, layers: Mapping[str, BinaryLayer], calls: Sequence[tuple[BlockCall, BlockCall]], gang: Gang
) -> bool:
    """Whether every call of the block, on every rank, uses each layer exactly once."""
    uses = dict.fromkeys(layers, 0)

    def hook(name: str) -> Any:
        def count(*_: Any) -> None:
            uses[name] += 1

        return count

    wrong = 0
    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        for (args, kwargs), _ in calls:
            uses.update(dict.fromkeys(layers, 0))
            with torch.no_grad():
                block(*args, **kwargs)
            wrong += any(count != 1 for count in uses.values())
    finally:
        for handle in handles:
            handle.remove()
    device = next(iter(layers.values())).weight.device
    return int(gang.sum(torch.tensor([wrong], device=device))) == 0


def _cast(value: Any) -> Any:
    """The same arguments with every floating-point tensor in float32."""
    if isinstance(value, Tensor):
        return value.detach().float() if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        return type(value)(_cast(v) for v in value)
    if isinstance(value, dict):
        return {k: _cast(v) for k, v in value.items()}
    return value


def _average(parameters: Sequence[nn.Parameter], gang: Gang) -> None:
    """Mean gradients over ranks; a rank that has none for a parameter counts as zero."""
    if gang.size == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = gang.sum(torch.cat([g.reshape(-1) for g in gradients])) / gang.size
    for parameter, piece in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
        parameter.grad = piece.view_as(parameter)
