"""Owns one run: the same windows, loss, schedule and evaluation for every method. Knows no method by name.

Every step, whatever the method: KL(teacher ‖ student) on the step's windows → backward → clip → flips, where the method
has them → AdamW, with warm-up and cosine on all rates. The stopwatch leaves evaluation out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.tasks import CONTEXT, Task
from kbop_core.distill import kl_to_log_probs, top_k_loss, top_targets
from kbop_core.full_precision import OTHER_LR, SCALE_LR, parameter_groups
from kbop_core.perplexity import Quality, evaluate
from kbop_core.schedules import warmup_cosine
from kbop_core.text import WindowOrder

#: Share of the steps in which all rates rise; AdamW's (β₁, β₂); largest norm of the gradient. The same for all methods.
WARMUP, BETAS, CLIP = 0.05, (0.9, 0.95), 1.0
#: Last part of the names of latent weights.
LATENT = "latent"
#: Version of what all methods share, part of every run's key.
PROTOCOL = 2
#: Points of a run's validation curve.
CURVE = 8
EVALUATION_BATCH = 32


class Diverged(Exception):
    """The loss of a run is not finite: its rate is too large for the method."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's result: its canonical JSON is its key.

    Attributes:
        task: key of tasks.SOURCES.
        method: key of methods.METHODS.
        tokens: training tokens.
        seed: of data order, calibration windows and random starts.
        batch_tokens: tokens in a step.
        group: weights of a row that share a scale.
        lr: the method's own rate: peak of latent AdamW, peak share of flips, or a rule's threshold.
        scale_lr: peak AdamW rate of scales (and experts), a share of their size (kbop_core/full_precision.py).
        other_lr: of norms, biases, embeddings, head and routers, likewise.
        options: what an ablation changes, name → value.
    """

    task: str
    method: str
    tokens: int = 0
    seed: int = 0
    batch_tokens: int = 1024
    group: int = 64
    lr: float = 0.0
    scale_lr: float = SCALE_LR
    other_lr: float = OTHER_LR
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        plain = self.tokens // self.batch_tokens
        return plain if self.late == 1 else plain // 2 + (plain - plain // 2) // self.late

    @property
    def late(self) -> int:
        """How many batches make one step in the second half of the tokens: option `late_batch`."""
        return int(self.options.get("late_batch", 1))

    def batches(self, step: int) -> range:
        """Numbers of the batches that a step reads, of the endless order."""
        early = self.tokens // self.batch_tokens // 2
        if self.late == 1 or step < early:
            return range(step, step + 1)
        start = early + (step - early) * self.late
        return range(start, start + self.late)

    @property
    def warmup_steps(self) -> int:
        """Steps in which all rates rise."""
        return max(1, math.ceil(WARMUP * self.steps))


class Flipper(Protocol):
    """Flips signs after each backward pass."""

    def step(self) -> tuple[int, int]:
        """(flips, of them back to the sign before the last flip)."""
        ...


@dataclass
class Student:
    """A model under one method.

    Attributes:
        model: its parameters that require gradients train.
        bits: stored bits per binarized weight, at inference.
        state_bytes: bytes per binarized weight that live between two steps: weights and optimizer state.
        flipper: where the method has one.
        finish: called after the last step, before the student is evaluated.
    """

    model: nn.Module
    bits: float
    state_bytes: float
    flipper: Flipper | None = None
    finish: Callable[[], None] = lambda: None


def run(task: Task, config: RunConfig, student: Student) -> dict[str, Any]:
    """Train and evaluate; returns plain data: perplexities, curves, seconds, bits, state."""
    clock, curve, flips = 0.0, [], []
    if config.steps:
        trainer = _Trainer(task, config, student)
        task.log_probs([0])  # made at first use; not part of any method's time
        marks = {math.ceil(config.steps * (i + 1) / CURVE) for i in range(CURVE)}
        began = time.perf_counter()
        for step in range(config.steps):
            trainer.step(step)
            if step + 1 in marks:
                if task.device.type == "cuda":
                    torch.cuda.synchronize()
                clock += time.perf_counter() - began
                value = _quality(student.model, task, "validation").perplexity
                curve.append([config.batches(step).stop * config.batch_tokens, round(clock, 1), value])
                flips.append(trainer.take_flips())
                began = time.perf_counter()
        trainer.average.take()
        student.finish()
    extra: dict[str, Any] = {}
    if not config.tokens:
        extra["teacher"] = _quality(task.teacher, task, "test").perplexity
    validation, test = _quality(student.model, task, "validation"), _quality(student.model, task, "test", teacher=True)
    return {
        "validation": validation.perplexity,
        "test": test.perplexity,
        "kl": test.kl_to_teacher,
        "top1": test.top1_agreement,
        "seconds": round(clock, 1),
        "bits": student.bits,
        "state_bytes": student.state_bytes,
        "curve": curve,
        "flips": flips,
    } | extra


def _quality(model: nn.Module, task: Task, part: str, teacher: bool = False) -> Quality:
    return evaluate(model.eval(), getattr(task, part), EVALUATION_BATCH, task.teacher if teacher else None)


@torch.no_grad()
def hidden_sizes(model: nn.Module, ids_BT: Tensor) -> list[float]:
    """Root mean square of the hidden states before each block: how signals pass through."""
    states = model(input_ids=ids_BT, use_cache=False, output_hidden_states=True).hidden_states
    return [round(float(state.square().mean().sqrt()), 4) for state in states[:-1]]


class _Average:
    """The mean of the real parameters over the last share of the steps, which then takes their place; share 0: none."""

    def __init__(self, parameters: list[nn.Parameter], steps: int, share: float) -> None:
        self.parameters, self.start = parameters, steps - round(share * steps)
        self.means: list[Tensor] = []

    @torch.no_grad()
    def see(self, step: int) -> None:
        if step < self.start:
            return
        if not self.means:
            self.means = [p.detach().clone() for p in self.parameters]
        for mean, parameter in zip(self.means, self.parameters, strict=True):
            mean.lerp_(parameter, 1.0 / (step - self.start + 1))

    @torch.no_grad()
    def take(self) -> None:
        for mean, parameter in zip(self.means, self.parameters, strict=bool(self.means)):
            parameter.copy_(mean)


class _Trainer:
    def __init__(self, task: Task, config: RunConfig, student: Student) -> None:
        self.task, self.config, self.student = task, config, student
        student.model.eval()  # no dropout: it would blur the teacher
        named = dict(student.model.named_parameters())
        latents = [p for name, p in named.items() if name.endswith(LATENT)]
        real = ((name, p) for name, p in named.items() if not name.endswith(LATENT))
        groups = parameter_groups(real, config.scale_lr, config.other_lr)
        groups += [{"params": latents, "lr": config.lr}] if latents else []
        self.peaks, self.parameters = [float(group["lr"]) for group in groups], list(named.values())
        self.optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0, fused=True)
        self.order = WindowOrder(len(task.train_NT), config.seed)
        self.average = _Average(self.parameters, config.steps, float(config.options.get("average", 0.0)))
        self.flips = self.back = 0

    def step(self, step: int) -> None:
        config = self.config
        factor = warmup_cosine(step, config.steps, config.warmup_steps)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = factor * peak
        windows, batches = config.batch_tokens // CONTEXT, config.batches(step)
        rows = list(self.order.indices(batches.start * windows, batches.stop * windows))
        loss = self._loss(self.task.train_NT[rows], self.task.log_probs(rows))
        if not bool(loss.isfinite()):
            raise Diverged(f"loss is {float(loss.detach())} at step {step}")
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        if self.student.flipper:
            flips, back = self.student.flipper.step()
            self.flips, self.back = self.flips + flips, self.back + back
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.see(step)

    def _loss(self, ids_BT: Tensor, log_p_BTV: Tensor) -> Tensor:
        """`distill` (1) times KL to the teacher; ablations add `hidden` alignment or `cross_entropy` of the text.

        `temperature` T softens both sides, times T²; `top_k` makes one of all but the teacher's k likeliest tokens.
        """
        options = self.config.options
        hidden = float(options.get("hidden", 0.0))
        out = self.student.model(input_ids=ids_BT, use_cache=False, output_hidden_states=hidden > 0)
        soft = float(options.get("temperature", 1.0))
        if soft != 1.0:
            log_p_BTV = (log_p_BTV / soft).log_softmax(-1)
        if top := int(options.get("top_k", 0)):
            loss = top_k_loss(out.logits / soft, top_targets(log_p_BTV, top))
        else:
            loss = kl_to_log_probs(out.logits / soft, log_p_BTV)
        loss = float(options.get("distill", 1.0)) * soft**2 * loss
        if hidden:
            with torch.no_grad():
                theirs = self.task.teacher(input_ids=ids_BT, use_cache=False, output_hidden_states=True).hidden_states
            parts = [
                F.mse_loss(a, b) / b.square().mean() for a, b in zip(out.hidden_states[1:], theirs[1:], strict=True)
            ]
            loss = loss + hidden * torch.stack(parts).mean()
        if weight := float(options.get("cross_entropy", 0.0)):
            loss = loss + weight * F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
        return loss

    def take_flips(self) -> list[int]:
        """[flips, of them reversals] since the last call."""
        taken = [self.flips, self.back]
        self.flips = self.back = 0
        return taken
