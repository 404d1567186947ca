"""Owns the table of sizes and machines: known model shapes, and the first way to train each that fits.

Refuses to compute a byte (memory_plan.py): it asks for the plans of one placement after another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from jobs.model_shape import ModelShape, shape_of_config
from jobs.plan import Plan
from jobs.plan_request import EvidenceKind, PlanRequest, TeacherPlacement

#: Values of the published config.json files; all tensors of these models follow from them.
KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    "0.6B": {  # Qwen3-0.6B
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
        "max_position_embeddings": 40_960, "tie_word_embeddings": True,
    },
    "1.7B": {  # Qwen3-1.7B
        "model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
        "max_position_embeddings": 40_960, "tie_word_embeddings": True,
    },
    "8B": {  # Qwen3-8B
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
        "max_position_embeddings": 40_960, "tie_word_embeddings": False,
    },
    "32B": {  # Qwen3-32B
        "model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 25_600, "num_hidden_layers": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
        "max_position_embeddings": 40_960, "tie_word_embeddings": False,
    },
    "70B": {  # Llama 3 70B
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128_256,
        "max_position_embeddings": 8192, "tie_word_embeddings": False,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind: how many on all hosts, and bytes of each."""

    name: str
    gpus: int
    memory: int


GB = 10**9
MACHINES = (
    Machine("1 × 24 GB", 1, 24 * GB),
    Machine("1 × 80 GB", 1, 80 * GB),
    Machine("8 × 80 GB", 8, 80 * GB),
    Machine("2 × 8 × 80 GB", 16, 80 * GB),
)
#: What the table tries, the cheapest first.
MICRO_BATCHES = (4, 2, 1)
EVIDENCE: tuple[EvidenceKind, ...] = ("bfloat16", "int8")
TEACHERS: tuple[TeacherPlacement, ...] = ("resident", "sharded", "offloaded", "cached")
TEACHERS_OF_ONE: tuple[TeacherPlacement, ...] = ("resident", "offloaded", "cached")


@dataclass(frozen=True)
class Cell:
    """One model on one machine: the default placement, and the first that fits, or the smallest where none does."""

    model: str
    machine: Machine
    default: Plan
    chosen: Plan


def placement(plan: Plan) -> str:
    """What a plan does otherwise than a job with default resources and one window a micro-step."""
    request = plan.request
    words = [
        f"micro-batch {request.micro_batch}" if request.micro_batch > 1 else "",
        "checkpointing" if request.activation_checkpointing else "",
        f"ZeRO {request.zero_stage}" if request.zero_stage != 1 else "",
        f"teacher {request.teacher}" if request.teacher != "resident" else "",
        "int8 evidence" if request.evidence == "int8" else "",
    ]
    return ", ".join(w for w in words if w) or "defaults"


def known_shape(name: str) -> ModelShape | None:
    """The shape of a known size such as "8B"; None for any other name."""
    config = KNOWN_CONFIGS.get(name)
    return None if config is None else shape_of_config(config, name)


def cells(context: int) -> Iterator[Cell]:
    """Every known model on every machine.

    Args:
        context: tokens in a window.
    """
    for name, machine in product(KNOWN_CONFIGS, MACHINES):
        shape = shape_of_config(KNOWN_CONFIGS[name], name)
        default = Plan(shape, PlanRequest(ranks=machine.gpus, context=context), machine.memory)
        yield Cell(name, machine, default, first_that_fits(default, MICRO_BATCHES))


def first_that_fits(base: Plan, micro_batches: Sequence[int]) -> Plan:
    """The first way to train the same model on the same devices that fits; none does: the one with the least memory.

    Args:
        base: a plan that knows the device's memory; what the ways below do not name stays as it is there.
        micro_batches: windows of a micro-step to try, best first.
    """
    plans = (replace(base, request=request) for request in _placements(base.request, micro_batches))
    best = next(plans)
    for plan in plans:
        if best.fits:
            break
        best = plan if plan.fits or plan.peak.bytes < best.peak.bytes else best
    return best


def _placements(base: PlanRequest, micro_batches: Sequence[int]) -> Iterator[PlanRequest]:
    """Ways to train, cheapest first: a change costs less the further right it stands in the product."""
    several = base.ranks > 1
    for teacher, evidence, zero_stage, again, micro_batch in product(
        TEACHERS if several else TEACHERS_OF_ONE,
        EVIDENCE,
        (1, 3) if several else (1,),
        (False, True),
        micro_batches,
    ):
        yield replace(
            base,
            micro_batch=micro_batch,
            evidence=evidence,
            zero_stage=zero_stage,
            teacher=teacher,
            activation_checkpointing=again,
        )
