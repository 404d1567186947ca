"""What `kbop plan` shows: one plan as tables, and the table of known models on known machines.

Refuses to compute: it is handed plans.
"""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from jobs.plan import USABLE, Plan
from jobs.plan_request import DEFAULT_CONTEXT
from jobs.plan_table import Cell, cells, first_that_fits, placement
from service.display import duration, number

#: Parts smaller than this share of a moment's bytes are shown as "other".
LEAST_SHARE = 0.005


def gigabytes(size: float) -> str:
    """Bytes in units of 10⁹, as device memory is sold."""
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def print_plan(plan: Plan, out: Console) -> None:
    """Memory, traffic, time and what would help."""
    request = plan.request
    source = "weight files" if plan.shape.exact else "config"
    out.print(
        f"{plan.shape.name}: {number(plan.shape.parameters)} parameters, {number(plan.memory.binary_weights)} of them "
        f"binary (sizes from the {source})"
    )
    out.print(
        f"ranks {request.ranks}, micro-steps {request.micro_steps} of {request.micro_batch} × {request.context} tokens,"
        f" ZeRO {request.zero_stage}, teacher {request.teacher}"
    )
    out.print(peak_table(plan))
    out.print(phase_table(plan))
    out.print(facts_table(plan))


def peak_table(plan: Plan) -> Table:
    """What fills the memory of a rank at its peak."""
    peak = plan.peak
    table = Table(title=f"Peak of a rank: {peak.name}", title_justify="left")
    table.add_column("part")
    for heading in ("size", "share"):
        table.add_column(heading, justify="right")
    small = 0
    for name, size in sorted(peak.parts.items(), key=lambda part: -part[1]):
        if size < LEAST_SHARE * peak.bytes:
            small += size
            continue
        table.add_row(name.replace("_", " "), gigabytes(size), f"{size / peak.bytes:.1%}")
    if small:
        table.add_row("other", gigabytes(small), f"{small / peak.bytes:.1%}")
    table.add_row("all", gigabytes(peak.bytes), "")
    return table


def phase_table(plan: Plan) -> Table:
    """The moments of a run with their bytes."""
    table = Table(title="Memory of a rank in each moment of a run", title_justify="left")
    for phase in plan.memory.phases:
        table.add_column(phase.name, justify="right")
    table.add_row(*(gigabytes(phase.bytes) for phase in plan.memory.phases))
    return table


def facts_table(plan: Plan) -> Table:
    """Everything else as lines."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for label, value in _facts(plan):
        table.add_row(label, value)
    return table


def _facts(plan: Plan) -> Iterable[tuple[str, str]]:
    weights = plan.memory.binary_weights
    if plan.device_memory is not None:
        usable = f"{USABLE:.0%} of {gigabytes(plan.device_memory)}"
        yield "fits", f"{'yes' if plan.fits else 'no'}: {gigabytes(plan.peak.bytes)} of {usable}"
    yield "binary weights, per rank", f"{gigabytes(plan.kbop_bytes)}, {plan.kbop_bytes / weights:.2f} bytes a weight"
    latent = f"{gigabytes(plan.latent_bytes)}, {plan.latent_bytes / weights:.2f} bytes a weight"
    yield "as latent weights, AdamW, ZeRO 2", latent
    for name, size in plan.traffic.items():
        yield f"sent per step and rank, {name}", gigabytes(size)
    if plan.host_bytes:
        yield "host memory, per rank", gigabytes(plan.host_bytes)
    for name, size in plan.disk_bytes.items():
        yield f"disk, {name}", gigabytes(size)
    yield "FLOP per token", f"{plan.flops_per_token:.3g}"
    if plan.speed is None:
        yield "training time", "not known: nobody gave a throughput (--tokens-per-s, --report or --flops-per-s)"
    else:
        speed = f"{number(plan.speed.tokens_per_s)} tokens/s, {plan.speed.source}"
        yield "training time", f"{duration(plan.seconds)} for {number(plan.tokens)} tokens at {speed}"
    if not plan.fits:
        for words, size in plan.suggestions():
            yield "with " + words, gigabytes(size)
    if plan.fits is False:
        other = first_that_fits(plan, [plan.request.micro_batch, 1] if plan.request.micro_batch > 1 else [1])
        yield ("fits as" if other.fits else "least of all ways"), f"{gigabytes(other.peak.bytes)}: {placement(other)}"


def print_table(out: Console) -> None:
    """Known models on known machines, with windows of the longest default."""
    out.print(fitting_table(cells(DEFAULT_CONTEXT), DEFAULT_CONTEXT))


def fitting_table(found: Iterable[Cell], context: int) -> Table:
    """Known models on known machines."""
    table = Table(title=f"GPU memory of one rank, windows of {context} tokens", title_justify="left")
    for heading in ("model", "machine", "defaults", "placement", "per GPU", "fits", "peak at", "largest part"):
        table.add_column(heading, justify="right" if heading in ("defaults", "per GPU") else "left")
    for cell in found:
        peak = cell.chosen.peak
        table.add_row(
            cell.model,
            cell.machine.name,
            gigabytes(cell.default.peak.bytes),
            placement(cell.chosen),
            gigabytes(peak.bytes),
            "yes" if cell.chosen.fits else "no",
            peak.name,
            peak.largest.replace("_", " "),
        )
    return table
