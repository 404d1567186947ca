"""What `kbop metrics` shows: a job's training series as a table, with a curve of each number.

Refuses to talk to a server: it is handed the series.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.training_series import PHASES
from service.display import Json, console, duration, number, size

BLOCKS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 40

Format = Callable[[float | None], str]
#: Key of a step, what it is called here, how its values are written.
ROWS: tuple[tuple[str, str, Format], ...] = (
    ("loss", "loss, nats per token", number),
    ("flip_rate", "flip rate", number),
    ("reversal_rate", "reversal rate", number),
    ("tokens_per_s", "tokens per second", number),
    ("peak_bytes", "peak memory", size),
    ("mfu", "MFU", number),
)


def curve(values: Sequence[float], width: int = CURVE_WIDTH) -> str:
    """The values as block characters, lowest to highest: means of neighbours where there are more than `width`."""
    count = min(width, len(values))
    if not count or min(values) == max(values):  # means of equal numbers differ in their last digit
        return BLOCKS[0] * count
    edges = [len(values) * i // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    return "".join(BLOCKS[round((mean - low) / span * (len(BLOCKS) - 1)) if span else 0] for mean in means)


def series_table(steps: Sequence[Json]) -> Table:
    """One row per number: first, last, lowest, highest, curve. Numbers that no step has are left out."""
    table = _table("metric")
    for key, label, text in ROWS:
        _add_row(table, label, [step.get(key) for step in steps], text)
    for phase in PHASES:
        _add_row(table, f"{phase} time", [(step.get("seconds") or {}).get(phase) for step in steps], _seconds)
    return table


def layers_table(steps: Sequence[Json]) -> Table:
    """One row per layer and kind, flips and reversals, as in `series_table`."""
    table = _table("layer")
    for layer in _layers(steps):
        for kind in ("flips", "reversals"):
            _add_row(table, f"{layer} {kind}", [(step.get(kind) or {}).get(layer) for step in steps], number)
    return table


def print_series(series: Json, out: Console | None = None) -> None:
    """The whole series as tables."""
    out = out or console()
    steps: list[Mapping[str, Any]] = series["data"]
    if not steps:
        out.print(f"{series['job_id']} has no training steps to show")
        return
    thinned = "" if series["every"] == 1 else f", every {series['every']:,} steps"
    out.print(f"{series['job_id']}  steps {steps[0]['step']:,} to {steps[-1]['step']:,}{thinned}")
    out.print(series_table(steps))
    if any(True for _ in _layers(steps)):
        out.print(layers_table(steps))


def _layers(steps: Sequence[Json]) -> Iterator[str]:
    """Every layer's name once, in the order of the model."""
    return iter(dict.fromkeys(layer for step in steps for layer in step.get("flips") or {}))


def _seconds(value: float | None) -> str:
    """Parts of a step take milliseconds."""
    return f"{1000 * value:.3g} ms" if value is not None and value < 1 else duration(value)


def _table(heading: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(heading, overflow="fold")
    for name in ("first", "last", "lowest", "highest"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("curve", no_wrap=True)
    return table


def _add_row(table: Table, label: str, values: Sequence[float | None], text: Format) -> None:
    known = [value for value in values if value is not None]
    if known:
        numbers = (known[0], known[-1], min(known), max(known))
        table.add_row(label, *(text(value) for value in numbers), curve(known))
