"""The `kbop plan` command: its options and what it prints.

Refuses to hold logic: planning.py turns options into a plan, plan_display.py a plan into text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


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
    from jobs.errors import JobsError
    from service.display import console, error_text
    from service.plan_display import print_plan, print_table
    from service.planning import PlanOptions, make_plan
    from service.spec_errors import InvalidSpec
    from service.spec_options import SpecInputError, SpecOptions

    if table:
        print_table(console())
        return
    named = SpecOptions(file=spec, model=model, tokens=tokens, gpus=gpus, settings=tuple(settings or ()))
    changes = (zero_stage, teacher, checkpointing)
    options = PlanOptions(named, device, gpu_memory, *changes, tokens_per_s, report, flops_per_s, utilization)
    try:
        made = make_plan(options)
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
