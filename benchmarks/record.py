"""Owns how a benchmark's result is shown and stored. Measures nothing.

results/NAME.json: command, commit, machine, at, rows (as printed) and claims [{name, value, unit, bar, holds}].
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
#: Folder of the shared real models and texts (see README); benchmarks that need it skip their rows without it.
DATA_VARIABLE = "KBOP_SHARED_DATA"


@dataclass(frozen=True)
class Claim:
    """One figure beside its bar. `bar` reads like "<= 1.10"; `holds` says whether the value meets it."""

    name: str
    value: float
    unit: str
    bar: str
    holds: bool


def claim(name: str, value: float, unit: str, bar: str) -> Claim:
    """A claim whose `holds` follows from its bar: "<= X" or ">= X"."""
    relation, _, limit = bar.partition(" ")
    holds = value <= float(limit) if relation == "<=" else value >= float(limit)
    return Claim(name, round(value, 4), unit, bar, holds)


def shared_data() -> Path | None:
    """The folder named by KBOP_SHARED_DATA, or `../shared/data` beside the project; None when there is none."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get(DATA_VARIABLE, default))
    return folder if folder.is_dir() else None


def publish(name: str, command: str, rows: Sequence[dict[str, Any]], claims: Sequence[Claim]) -> None:
    """Print rows and claims as tables and write results/NAME.json."""
    console = Console()
    console.print(_table(name, rows))
    console.print(_table("claims", [asdict(c) for c in claims]))
    result = {
        "command": command,
        "commit": commit(),
        "machine": machine(),
        "at": time.strftime("%Y-%m-%d", time.gmtime()),
        "rows": list(rows),
        "claims": [asdict(c) for c in claims],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=title)
    columns = list(rows[0]) if rows else []
    for column in columns:
        table.add_column(column, justify="left" if column in ("model", "method", "name") else "right")
    for row in rows:
        table.add_row(*[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()])
    return table


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table, or that there are none yet."""
    if not rows:
        return "Not run yet."
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([_cell(v) for v in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def fill(document: Path, sections: Mapping[str, str], command: str) -> None:
    """Replace what stands between the markers `NAME: begin, by COMMAND` and `NAME: end` that a document has."""
    text = document.read_text(encoding="utf-8")
    for name, body in sections.items():
        begin, end = f"<!-- {name}: begin, by {command} -->", f"<!-- {name}: end -->"
        if begin in text and end in text:
            before, rest = text.split(begin, 1)
            text = f"{before}{begin}\n{body}\n{end}{rest.split(end, 1)[1]}"
    document.write_text(text, encoding="utf-8")


def commit() -> str:
    """Short hash of HEAD, "-dirty" where files other than results differ from it; "unknown" without git."""
    head = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", *_CODE)
    return f"{head}-dirty" if head and changed else head or "unknown"


#: What decides a result: everything that is not written from results.
_CODE = (":/", ":(top,exclude)benchmarks/results", ":(top,exclude)docs", ":(top,exclude)README.md")


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, check=False).stdout.strip()


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
