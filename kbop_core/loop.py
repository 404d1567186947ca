"""Owns the training loop: micro-steps, finite check, flips, step. Yields what happened; prints and times nothing.

    for metrics in train(run, range(start, steps)): …

One step, on every rank:
    for each micro-step:  distance to the teacher → finite on all ranks? → backward (gradients of signs leave for their
    owners)
    KBOP flips signs → AdamW moves scales and the other full-precision parameters
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kbop_core.convert import binary_layers
from kbop_core.engine import Engine, EngineConfig
from kbop_core.errors import NonFiniteLoss, OutOfMemory
from kbop_core.evidence import EvidenceKind
from kbop_core.full_precision import OTHER_LR, SCALE_LR, parameter_groups
from kbop_core.kbop import KBOP, FlipStats
from kbop_core.phases import Phases
from kbop_core.recompute import recompute_blocks
from kbop_core.schedules import FLIP_RATE, FlipSchedule, warmup_cosine
from kbop_core.shard import Gang
from kbop_core.teacher import LiveTeacher, Teacher
from kbop_core.window_source import WindowSource

#: What errors without a class of their own say where memory does not suffice: the host's allocator, CUDA, cuBLAS, NCCL.
OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Cuda failure 2 'out of memory'",
)


@dataclass(frozen=True)
class StepLayout:
    """How the windows of one step are dealt to ranks and micro-steps: the same windows wherever `windows` is the same.

    Attributes:
        context: tokens in a window.
        windows: windows in a step, all ranks; a multiple of ranks · micro_batch.
        ranks: N.
        micro_batch: windows of a rank in one micro-step.
    """

    context: int
    windows: int
    ranks: int
    micro_batch: int

    @property
    def micro_steps(self) -> int:
        """Micro-steps in a step."""
        return self.windows // (self.ranks * self.micro_batch)

    @property
    def tokens(self) -> int:
        """Tokens in a step, all ranks."""
        return self.windows * self.context

    def places(self, step: int, micro_step: int, rank: int) -> range:
        """Places of a rank's windows in the endless training order."""
        start = step * self.windows + (micro_step * self.ranks + rank) * self.micro_batch
        return range(start, start + self.micro_batch)


def layout_steps(
    batch_tokens: int, context: int, ranks: int, max_micro_batch: int, windows: int | None = None
) -> StepLayout:
    """The layout nearest to `batch_tokens` tokens a step with equally many whole windows, at least 1, on each rank.

    Args:
        batch_tokens, context, ranks: see StepLayout.
        max_micro_batch: most windows of a rank in one micro-step.
        windows: in a step, when the run has begun with another number of ranks; kept if it can be dealt equally.
    """
    if windows is not None and windows % ranks == 0:
        batch_tokens = windows * context
    per_rank = max(1, round(batch_tokens / (context * ranks)))
    micro_batch = max(d for d in range(1, min(per_rank, max_micro_batch) + 1) if per_rank % d == 0)
    return StepLayout(context, per_rank * ranks, ranks, micro_batch)


@dataclass(frozen=True)
class TrainConfig:
    """The numbers of a run; docs/quality.md says where each default comes from.

    Attributes:
        steps: optimizer steps, ≥ 1.
        flip_rate: peak share of each layer's signs flipped in a step, 0 … 0.5.
        momentum: constant decay of the evidence, 0 ≤ β ≤ 0.9999; None: MomentumSchedule's growing memory.
        evidence: how the evidence is stored, "bfloat16" or "int8".
        scale_lr: peak AdamW learning rate of scales, a share of their size (full_precision.py).
        other_lr: of norms, biases, embeddings and head, likewise.
        warmup: share of the steps in which all rates rise, 0 … 1.
        zero_stage: DeepSpeed ZeRO stage of the full-precision side, 0 … 3.
        activation_checkpointing: blocks compute their forward pass again in backward instead of keeping it.
        timeout_s: of collectives, seconds.
    """

    steps: int
    flip_rate: float = FLIP_RATE
    momentum: float | None = None
    evidence: EvidenceKind = "bfloat16"
    scale_lr: float = SCALE_LR
    other_lr: float = OTHER_LR
    warmup: float = 0.05
    zero_stage: int = 1
    activation_checkpointing: bool = False
    timeout_s: float = 600.0

    @property
    def warmup_steps(self) -> int:
        """Steps in which all rates rise."""
        return max(1, math.ceil(self.warmup * self.steps))

    @property
    def flip_schedule(self) -> FlipSchedule:
        """η over the run."""
        return FlipSchedule(self.flip_rate, self.steps, self.warmup_steps)


@dataclass(frozen=True)
class StepMetrics:
    """What one step did, equal on all ranks.

    Attributes:
        step: number of the step, from 0.
        loss: mean KL to the teacher over the step's windows, nats per token, before the update.
        stats: flips and reversals, in all and per layer.
        seconds: this rank's time by phase (phases.PHASES); zeros without a clock.
    """

    step: int
    loss: float
    stats: FlipStats
    seconds: Mapping[str, float]


@dataclass
class Run:
    """Everything one training run holds. Make it with `start_run`."""

    config: TrainConfig
    layout: StepLayout
    gang: Gang
    teacher: Teacher
    engine: Engine
    kbop: KBOP
    windows: WindowSource
    device: torch.device

    def batch(self, step: int, micro_step: int) -> tuple[Tensor, list[int]]:
        """This rank's windows of a micro-step, int64 (B, T), on the device, and their numbers."""
        numbers = self.windows.numbers(self.layout.places(step, micro_step, self.gang.rank))
        return self.windows.rows(numbers).to(self.device), numbers


def start_run(
    student: nn.Module,
    teacher: Teacher | nn.Module,
    windows: WindowSource,
    config: TrainConfig,
    layout: StepLayout,
    gang: Gang,
    phases: Phases | None = None,
) -> Run:
    """Put a binary student's full-precision side into DeepSpeed and its signs under KBOP.

    Args:
        student: with BinaryLinear layers (trainable); every floating-point parameter of it will train.
        teacher: see teacher.py; a model is a live one.
        windows: what to train on, in the order of the run.
        phases: measures `StepMetrics.seconds`; None: nothing is measured.
    """
    device = next(student.parameters()).device
    student.eval().requires_grad_(True)  # no dropout: it would blur the teacher, and make a resumed run another one
    groups = parameter_groups(student.named_parameters(), config.scale_lr, config.other_lr)
    engine_config = EngineConfig(layout.micro_batch, layout.micro_steps, config.zero_stage, bf16=device.type == "cuda")
    layers = binary_layers(student)
    if config.activation_checkpointing:
        recompute_blocks(student)
    engine = Engine(student, groups, engine_config, gang, config.timeout_s)
    gang = replace(gang, group=engine.group if gang.size > 1 else None, phases=phases or Phases())
    kbop = KBOP(layers, config.flip_schedule, config.momentum, layout.micro_steps, gang, config.evidence)
    live = LiveTeacher(teacher) if isinstance(teacher, nn.Module) else teacher
    return Run(config, layout, gang, live, engine, kbop, windows, device)


def train(run: Run, steps: Iterable[int]) -> Iterator[StepMetrics]:
    """Do the given steps in order; yields after each.

    Raises:
        NonFiniteLoss: on every rank, before anything of that step changed.
        NonFiniteGradient: on every rank, before the step counts: the run goes on from its last checkpoint.
        OutOfMemory: on the rank that met it: the others wait for it, so the run must end.
    """
    for step in steps:
        try:
            metrics = _step(run, step)
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                reason = str(error).partition("\n")[0] or type(error).__name__
                raise OutOfMemory(run.layout.micro_batch, reason) from error
            raise
        yield metrics


def _step(run: Run, step: int) -> StepMetrics:
    phase = run.gang.phases.phase
    run.engine.set_learning_rates(warmup_cosine(step, run.config.steps, run.config.warmup_steps))
    total = 0.0
    for micro_step in range(run.layout.micro_steps):
        total += _micro_step(run, step, micro_step)
        if micro_step < run.layout.micro_steps - 1:
            run.engine.step()
    with phase("flips"):
        stats = run.kbop.step()
    with phase("optimizer"):
        run.engine.step()
    return StepMetrics(step, total / run.layout.micro_steps, stats, run.gang.phases.take())


def _micro_step(run: Run, step: int, micro_step: int) -> float:
    """Forward and backward pass of a micro-step; its mean loss over ranks."""
    phase = run.gang.phases.phase
    ids, numbers = run.batch(step, micro_step)
    with phase("forward"):
        loss = run.teacher.loss(run.engine(ids), ids, numbers)
        mean = _finite_mean(loss, run.gang, step)
    with phase("backward"):
        run.engine.backward(loss)
    return mean


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's memory, or the host's, does not suffice."""
    text = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in text for words in OUT_OF_MEMORY)


def _finite_mean(loss: Tensor, gang: Gang, step: int) -> float:
    """Mean loss over ranks; an error on all of them when any rank's is not finite."""
    mean = float(gang.sum(loss.detach().clone().float().reshape(1))) / gang.size
    if not math.isfinite(mean):
        raise NonFiniteLoss(
            f"the loss is {mean} at step {step}; no weight was changed in this step",
            "lower flip_rate, scale_lr and other_lr, or check the model's weights and the text",
        )
    return mean
