"""The `kbop plan` command: what a job would take, without a server and without torch.

Refuses to hold formulas: it turns options into a plan (jobs/plan.py) and a plan into text (plan_display.py).
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.errors import BadPlan, JobsError
from jobs.json_files import read_json
from jobs.model_shape import ModelShape, shape_of_source
from jobs.plan import Plan, Speed, derived_speed, speed_from_report
from jobs.plan_request import DEFAULT_CONTEXT, request_from_spec
from jobs.plan_table import cells, known_shape
from jobs.sources import locate_model
from jobs.spec import JobSpec
from service.display import console, error_text
from service.plan_display import fitting_table, print_plan
from service.spec_errors import InvalidSpec, parse_spec
from service.spec_options import SpecInputError, SpecOptions, absolute_source

#: Where a plan without a spec file pretends its text comes from; no text is read.
ANY_TEXT = "builtin:python-docs"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def plan(  # noqa: PLR0913 (the options of a command)
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="builtin:demo, a folder, or a size: 0.6B 1.7B 8B 32B 70B.")
    ] = None,
    spec: Annotated[Path | None, typer.Option(help="Job spec as JSON; other options replace its fields.")] = None,
    gpus: Annotated[int | None, typer.Option(help="Ranks: one per GPU.")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Of one GPU, such as 80GB or 24GiB.")] = None,
    device: Annotated[str, typer.Option(help="cuda (bfloat16) or cpu (float32).")] = "cuda",
    tokens: Annotated[int | None, typer.Option(help="Training tokens.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other field of a spec: --set method.context=4096"),
    ] = None,
    zero_stage: Annotated[int | None, typer.Option(help="DeepSpeed ZeRO stage, 0 to 3.")] = None,
    teacher: Annotated[str | None, typer.Option(help="resident, offloaded, sharded or cached.")] = None,
    checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help="Run blocks again in backward.")
    ] = False,
    by_blocks: Annotated[
        bool, typer.Option("--student-by-blocks", help="Binarize block by block, no dense student on the GPU.")
    ] = False,
    tokens_per_s: Annotated[float | None, typer.Option(help="Throughput of all ranks that you know of.")] = None,
    report: Annotated[Path | None, typer.Option(help="report.json of a job whose throughput to assume.")] = None,
    flops_per_s: Annotated[float | None, typer.Option(help="FLOP/s of one GPU; needs --utilization.")] = None,
    utilization: Annotated[float | None, typer.Option(help="Share of these FLOP/s in use, 0 to 1.")] = None,
    table: Annotated[bool, typer.Option("--table", help="Known models on known machines instead.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Say what a job would take: memory of a rank, traffic, disk, time. Needs no server, no GPU and no weights.

    Sizes come from a folder's config.json and the headers of its weight files. Time is told only when a throughput is:
    stated (--tokens-per-s), measured by an earlier job (--report), or derived (--flops-per-s with --utilization).
    """
    if table:
        console().print(fitting_table(cells(DEFAULT_CONTEXT), DEFAULT_CONTEXT))
        return
    try:
        options = SpecOptions(
            file=spec,
            model=model,
            data=() if spec else (ANY_TEXT,),
            tokens=tokens,
            gpus=gpus,
            settings=tuple(settings or ()),
        )
        job = parse_spec(json.dumps(options.build()))
        changes: dict[str, Any] = {"zero_stage": zero_stage, "teacher": teacher}
        changes |= {"activation_checkpointing": checkpointing or None, "build": "blocks" if by_blocks else None}
        made = _plan(job, device, parse_size(gpu_memory), {k: v for k, v in changes.items() if v is not None})
        made = replace(made, speed=_speed(made, tokens_per_s, report, (flops_per_s, utilization)))
    except (SpecInputError, InvalidSpec) as error:
        typer.echo(error_text(str(error)), err=True)
        raise typer.Exit(2) from None
    except JobsError as error:
        typer.echo(error_text(error.message, error.hint, error.code), err=True)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(made.to_json(), indent=2, ensure_ascii=False))
    else:
        print_plan(made, console())


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


def _plan(job: JobSpec, device: str, memory: int | None, changes: dict[str, Any]) -> Plan:
    if device not in ("cuda", "cpu"):
        raise BadPlan(f"device is {device!r}", "legal: cuda, cpu")
    if not job.train_tokens:
        raise BadPlan("effort 'quick' trains nothing end to end", "plan tells what training takes: use 'standard'")
    shape = _shape(job.model)
    request = replace(request_from_spec(job, shape.longest, device), **changes)
    return Plan(shape, request, memory, job.train_tokens)


def _shape(model: str) -> ModelShape:
    known = known_shape(model)
    return known or shape_of_source(locate_model(absolute_source(model, Path.cwd())), model)


def _speed(
    plan: Plan, tokens_per_s: float | None, report: Path | None, derived: tuple[float | None, float | None]
) -> Speed | None:
    """The one throughput that was given; BadPlan for several, or half of a derived one."""
    flops_per_s, utilization = derived
    if (flops_per_s is None) != (utilization is None):
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
    if flops_per_s is not None and utilization is not None:
        return derived_speed(plan, flops_per_s, utilization)
    return None
