"""Owns what a plan is asked about: how a model is to be trained, as numbers, and what a job spec says of it.

Refuses to compute a byte (memory_plan.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from jobs.errors import BadPlan
from jobs.spec import JobSpec

TeacherPlacement = Literal["resident", "offloaded", "sharded", "cached"]
EvidenceKind = Literal["bfloat16", "int8"]
#: Longest window, in tokens, that a job takes without being told (`method.context`).
DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class PlanRequest:
    """How a model is to be trained.

    Attributes:
        ranks: N, one per GPU.
        device: "cuda" (bfloat16) or "cpu" (float32).
        micro_batch: windows of a rank in one micro-step.
        context: tokens in a window.
        micro_steps: micro-steps in a step.
        group_size: weights of a row that share a scale.
        keep: layers that stay in full precision.
        evidence: "bfloat16" or "int8".
        flip_rate: peak share of signs flipped in a step, 0 … 0.5.
        zero_stage: 0 … 3, of the full-precision side.
        teacher: where the teacher lives.
        activation_checkpointing: whether blocks are run again in backward instead of keeping what they computed.
    """

    ranks: int = 1
    device: Literal["cuda", "cpu"] = "cuda"
    micro_batch: int = 1
    context: int = 2048
    micro_steps: int = 1
    group_size: int = 128
    keep: tuple[str, ...] = ()
    evidence: EvidenceKind = "bfloat16"
    flip_rate: float = 0.004
    zero_stage: int = 1
    teacher: TeacherPlacement = "resident"
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.teacher not in get_args(TeacherPlacement):
            raise BadPlan(f"teacher is {self.teacher!r}", f"legal: {', '.join(get_args(TeacherPlacement))}")
        for name in ("ranks", "micro_batch", "context", "micro_steps", "group_size"):
            if (value := getattr(self, name)) < 1:
                raise BadPlan(f"{name} is {value}", f"{name} is a whole number of 1 or more")
        if self.teacher == "sharded" and self.ranks == 1:
            raise BadPlan("teacher 'sharded' has one rank", "it is divided over ranks: use more, or 'offloaded'")
        if not 0 <= self.zero_stage <= 3:
            raise BadPlan(f"zero_stage is {self.zero_stage}", "legal: 0, 1, 2, 3")
        if not 0.0 <= self.flip_rate <= 0.5:
            raise BadPlan(f"flip_rate is {self.flip_rate}", "legal: 0 … 0.5")

    @property
    def element(self) -> int:
        """w: bytes of a parameter, activation or gradient."""
        return 4 if self.device == "cpu" else 2

    @property
    def micro_tokens(self) -> int:
        """n: tokens of a rank in one micro-step."""
        return self.micro_batch * self.context


def request_from_spec(spec: JobSpec, own_context: int | None, device: str) -> PlanRequest:
    """What a job spec asks for.

    Args:
        spec: of the job.
        own_context: the model's longest window, tokens; None: not known.
        device: "cuda" or "cpu".
    """
    method, resources = spec.method, spec.resources
    context = method.context or min(own_context or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    micro_batch, micro_steps = deal_windows(method.batch_tokens, context, resources.gpus, resources.max_micro_batch)
    return PlanRequest(
        ranks=resources.gpus,
        device="cpu" if device == "cpu" else "cuda",
        micro_batch=micro_batch,
        context=context,
        micro_steps=micro_steps,
        group_size=spec.group_size,
        keep=spec.keep,
        evidence=method.evidence,
        flip_rate=method.flip_rate,
        zero_stage=resources.zero_stage,
        teacher=resources.teacher,
        activation_checkpointing=resources.activation_checkpointing,
    )


def deal_windows(batch_tokens: int, context: int, ranks: int, max_micro_batch: int) -> tuple[int, int]:
    """Windows in a micro-step and micro-steps in a step, as kbop_core.loop.layout_steps deals them."""
    per_rank = max(1, round(batch_tokens / (context * ranks)))
    micro_batch = max(d for d in range(1, min(per_rank, max_micro_batch) + 1) if per_rank % d == 0)
    return micro_batch, per_rank // micro_batch
