"""Owns one run: a network trained with one method, seed and rate, and what it scores.

Loss: mean |prediction − truth| over patches. Every learning rate, the flip rate too, warms up over the first
twentieth of the steps and follows a cosine to 0. AdamW: β = (0.9, 0.99), no weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.super_resolution.images import BRIGHTEST, DARKEST, Example, Images, Patches, bicubic, psnr
from benchmarks.super_resolution.methods import FULL, METHODS, PLAIN
from benchmarks.super_resolution.network import (
    Body,
    SuperResolution,
    binarize_plainly,
    binary_layers,
    body_weights,
    scales,
)
from kbop_core.kbop import KBOP
from kbop_core.schedules import FlipSchedule, warmup_cosine

#: Set name → PSNR in dB; "held out" is the part of T91 that rates are chosen on.
Scores = dict[str, float]
HELD_OUT = "held out"


@dataclass(frozen=True)
class Recipe:
    """What all runs share.

    Attributes:
        steps: of AdamW and KBOP.
        batch: patches per step.
        patch: side of a low-resolution patch, pixels.
        channels, blocks: of the network.
        scale_lr, other_lr: AdamW's learning rates of scales, and of all else that is real but the swept weights.
        momentum: KBOP's β; None: its growing memory.
    """

    steps: int = 1000
    batch: int = 8
    patch: int = 24
    channels: int = 16
    blocks: int = 4
    scale_lr: float = 3e-3
    other_lr: float = 4e-3
    momentum: float | None = None


@dataclass(frozen=True)
class RunConfig:
    """One run: a recipe and what is its own.

    Attributes:
        method: key of METHODS.
        scale: of the enlargement.
        rate: the swept one, see `Method.rates`.
        seed: of network, signs and patches.
    """

    method: str
    scale: int
    rate: float
    seed: int
    recipe: Recipe


@dataclass(frozen=True)
class RunResult:
    """What one run scored and held.

    Attributes:
        scores: row → set → PSNR; "full" gives two rows, itself and "plain", others one.
        loss: mean of the last tenth of the steps.
        state_bytes: per weight of the blocks' convolutions, what training holds between steps because of them.
        bits: row → bits to store per such weight, see `stored_bits`.
    """

    scores: dict[str, Scores]
    loss: float
    state_bytes: float
    bits: dict[str, float]


class Trainer:
    """Takes the steps of one run."""

    def __init__(self, config: RunConfig, images: Images) -> None:
        recipe, self.config = config.recipe, config
        body = METHODS[config.method].body
        self.network = SuperResolution(config.scale, recipe.channels, recipe.blocks, body, config.seed)
        self.patches = Patches(images, recipe.patch, recipe.batch, config.seed)
        self.warmup = max(1, recipe.steps // 20)
        self.weights, scaling = body_weights(self.network), scales(self.network)
        taken = {id(p) for p in (*self.weights, *scaling)}
        others = [p for p in self.network.parameters() if id(p) not in taken]
        kinds = [(self.weights, config.rate), (scaling, recipe.scale_lr), (others, recipe.other_lr)]
        groups = [{"params": parameters, "lr": rate, "peak": rate} for parameters, rate in kinds if parameters]
        self.adamw = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
        self.kbop: KBOP | None = None
        if layers := binary_layers(self.network):
            self.kbop = KBOP(layers, FlipSchedule(config.rate, recipe.steps, self.warmup), recipe.momentum)

    def step(self, number: int) -> float:
        """One batch; returns its loss.

        Raises:
            RuntimeError: the loss is not finite.
        """
        low, high = self.patches.draw()
        loss = F.l1_loss(self.network(low), high)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise RuntimeError(f"the loss is {value} at step {number} of {self.config}")
        self.adamw.zero_grad()
        loss.backward()
        for group in self.adamw.param_groups:
            group["lr"] = group["peak"] * warmup_cosine(number, self.config.recipe.steps, self.warmup)
        self.adamw.step()
        if self.kbop is not None:
            self.kbop.step()
        return value

    def state_bytes(self) -> float:
        """Per weight of the blocks' convolutions: the weight and its optimizer's state."""
        if self.kbop is not None:
            return self.kbop.state_bytes() / sum(la.signs_count for la in binary_layers(self.network).values())
        held = sum(w.nbytes for w in self.weights)
        held += sum(t.nbytes for w in self.weights for t in self.adamw.state[w].values() if t.dim())
        return float(held) / sum(w.numel() for w in self.weights)


def stored_bits(body: Body, channels: int) -> float:
    """Bits to store per weight of the blocks' convolutions: 32 for a real one; else one and 16 for other numbers.

    These are scales, shifts and slopes. Biases are not counted: they are in every row.
    """
    if body.weights == "real":
        return 32.0
    numbers = 2 * channels + (4 * channels if body.shifts else 0)  # of a block; shift, γ, ζ and slope
    return 1.0 + 16 * numbers / (2 * 9 * channels * channels)


@torch.no_grad()
def score(enlarge: Callable[[Tensor], Tensor], examples: list[Example], scale: int) -> float:
    """Mean PSNR over images, dB; predictions are clamped to luma's range.

    Args:
        enlarge: (1, 1, h, w) → (1, 1, s·h, s·w).
    """
    found = [psnr(enlarge(e.low[None])[0].clamp(DARKEST, BRIGHTEST), e.high, scale) for e in examples]
    return sum(found) / len(found)


def score_all(enlarge: Callable[[Tensor], Tensor], images: Images) -> Scores:
    """Test sets, and the held-out images."""
    sets = images.tests | {HELD_OUT: images.held_out}
    return {name: score(enlarge, examples, images.scale) for name, examples in sets.items()}


def bicubic_scores(images: Images) -> Scores:
    """The floor: no network."""
    return score_all(lambda low: bicubic(low, *(n * images.scale for n in low.shape[-2:])), images)


def run(config: RunConfig, images: Images, tell: Callable[[int, float], None] = lambda step, loss: None) -> RunResult:
    """Train and score.

    Args:
        tell: called after each step with its number and loss.
    """
    trainer, losses = Trainer(config, images), []
    for number in range(config.recipe.steps):
        losses.append(trainer.step(number))
        tell(number, losses[-1])
    body, channels = METHODS[config.method].body, config.recipe.channels
    scores = {config.method: score_all(trainer.network, images)}
    bits = {config.method: stored_bits(body, channels)}
    if config.method == FULL:
        binarize_plainly(trainer.network)
        scores[PLAIN] = score_all(trainer.network, images)
        bits[PLAIN] = stored_bits(replace(body, weights="binary"), channels)
    last = losses[-max(1, len(losses) // 10) :]
    return RunResult(scores, sum(last) / len(last), trainer.state_bytes(), bits)
