"""Turns the options of `kbop plan` into a plan.

Refuses to compute bytes (jobs/memory_plan.py) and to read a clock or a network: a model is a folder or a known size.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jobs.errors import BadPlan
from jobs.json_files import read_json
from jobs.model_shape import ModelShape, shape_of_source
from jobs.plan import Plan, Speed, derived_speed, speed_from_report
from jobs.plan_request import request_from_spec
from jobs.plan_table import known_shape
from jobs.sources import locate_model
from service.spec_errors import parse_spec
from service.spec_options import SpecOptions, absolute_source

#: Where a plan without a spec file pretends its text comes from; no text is read.
ANY_TEXT = "builtin:python-docs"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True)
class PlanOptions:
    """What a user gave; None means not given.

    Attributes:
        spec: the job; its data may be missing.
        device: "cuda" or "cpu".
        gpu_memory: of one device, as text.
        zero_stage, teacher, checkpointing: replace what the spec says (PlanRequest).
        tokens_per_s, report, flops_per_s, utilization: the throughput, in one of three ways.
    """

    spec: SpecOptions
    device: str = "cuda"
    gpu_memory: str | None = None
    zero_stage: int | None = None
    teacher: str | None = None
    checkpointing: bool = False
    tokens_per_s: float | None = None
    report: Path | None = None
    flops_per_s: float | None = None
    utilization: float | None = None


def make_plan(options: PlanOptions) -> Plan:
    """The plan that the options ask for.

    Raises:
        SpecInputError, InvalidSpec: the options make no job spec.
        BadPlan: numbers that cannot be, or no training to plan.
        SourceError: a model whose sizes cannot be read.
    """
    asked = options.spec if options.spec.file else replace(options.spec, data=(ANY_TEXT,))
    job = parse_spec(json.dumps(asked.build()))
    if options.device not in ("cuda", "cpu"):
        raise BadPlan(f"device is {options.device!r}", "legal: cuda, cpu")
    if not job.train_tokens:
        raise BadPlan("effort 'quick' trains nothing end to end", "plan tells what training takes: use 'standard'")
    shape = _shape(job.model)
    request = replace(request_from_spec(job, shape.longest, options.device), **_changes(options))
    plan = Plan(shape, request, parse_size(options.gpu_memory), job.train_tokens)
    return replace(plan, speed=_speed(plan, options))


def _changes(options: PlanOptions) -> dict[str, Any]:
    """What the options say of a request beyond the spec."""
    given = {
        "zero_stage": options.zero_stage,
        "teacher": options.teacher,
        "activation_checkpointing": options.checkpointing or None,
    }
    return {name: value for name, value in given.items() if value is not None}


def _shape(model: str) -> ModelShape:
    known = known_shape(model)
    return known or shape_of_source(locate_model(absolute_source(model, Path.cwd())), model)


def parse_size(text: str | None) -> int | None:
    """Bytes of a size such as "80GB" (10⁹) or "24 GiB" (2³⁰); None stays None.

    Raises:
        BadPlan: anything else.
    """
    if text is None:
        return None
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise BadPlan(f"{text!r} is not a size", "write a number and a unit, such as 80GB or 24GiB")
    return int(float(match[1]) * unit)


def _speed(plan: Plan, options: PlanOptions) -> Speed | None:
    """The one throughput that was given; BadPlan for several, or half of a derived one."""
    tokens_per_s, report, flops_per_s = options.tokens_per_s, options.report, options.flops_per_s
    if (flops_per_s is None) != (options.utilization is None):
        raise BadPlan("one of --flops-per-s and --utilization is missing", "give both: neither has a default")
    if sum(value is not None for value in (tokens_per_s, report, flops_per_s)) > 1:
        raise BadPlan("several throughputs were given", "give one of --tokens-per-s, --report and --flops-per-s")
    if tokens_per_s is not None:
        return Speed(tokens_per_s, "stated")
    if report is not None:
        found = read_json(report)
        if found is None:
            raise BadPlan(f"{report} is not a report", "give the report.json of a job that trained")
        return speed_from_report(found)
    if flops_per_s is not None and options.utilization is not None:
        return derived_speed(plan, flops_per_s, options.utilization)
    return None
