"""What the `kbop` command shows: live progress of a job, the report as tables, job lists, errors.

Refuses to talk to a server: it is handed events, jobs and reports.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Table

Json = Mapping[str, Any]

PLAIN_EVERY_S = 5.0
#: Width of tables that go into a file or a pipe.
PLAIN_WIDTH = 120
METRICS = (("loss", "loss"), ("flip_rate", "flips"), ("tokens_per_s", "tok/s"))


def console() -> Console:
    """Standard output, at its own width on a terminal; brackets and colons in names are shown as they are."""
    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    return Console(file=sys.stdout, width=width, markup=False, emoji=False, highlight=False)


def error_text(message: str, hint: str = "", code: str = "") -> str:
    """One paragraph for standard error."""
    end = "" if message.endswith((".", "!", "?")) else "."
    return f"Error: {message}{end}" + (f" Hint: {hint}." if hint else "") + (f" [{code}]" if code else "")


def number(value: float | None, digits: int = 4) -> str:
    """A number with `digits` significant digits, `-` for None; thousands are grouped."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def size(value: float | None) -> str:
    """Bytes in binary units."""
    if value is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{value:.2f} {unit}"


def duration(seconds: float | None) -> str:
    """Seconds as `12.3 s`, `2 m 05 s` or `1 h 02 m`."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} m"


def metrics_text(metrics: Json) -> str:
    """The metrics people follow, those that are there."""
    known = [(label, metrics[key]) for key, label in METRICS if isinstance(metrics.get(key), int | float)]
    return "  ".join(f"{label} {number(float(value))}" for label, value in known)


class JobView(AbstractContextManager["JobView"]):
    """Shows the events of one job: a live bar on a terminal, plain lines elsewhere."""

    def __init__(self, out: Console | None = None, *, clock: Any = time.monotonic) -> None:
        self._out = out or console()
        self._clock = clock
        self._last_plain = -PLAIN_EVERY_S
        self._held_back = ""
        self._live: Progress | None = None
        self._task: TaskID | None = None
        if self._out.is_terminal:
            self._live = Progress(
                TextColumn("{task.fields[stage]:<9}", markup=False),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%  {task.completed:.0f}/{task.fields[steps]}"),
                TextColumn("{task.fields[metrics]}", markup=False),
                TextColumn("{task.fields[eta]}"),
                TimeElapsedColumn(),
                console=self._out,
                transient=True,
            )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, kind: str, data: Json) -> None:
        """One event: its kind and its data as on the wire."""
        if kind == "progress":
            self._progress(data)
        elif kind == "stage":
            self._stage(data)
        elif kind == "status":
            reason = f" ({data['reason']})" if data.get("reason") else ""
            self._line(f"status   {data.get('to')}{reason}")
        elif kind == "note":
            self._line(f"note     {data.get('message')}")

    def _stage(self, data: Json) -> None:
        stage, state, seconds = data.get("stage"), data.get("state"), data.get("seconds")
        took = f" in {duration(seconds)}" if isinstance(seconds, int | float) else ""
        if self._held_back:
            self._line(self._held_back)
        self._held_back, self._last_plain = "", -PLAIN_EVERY_S
        self._line(f"{stage!s:<8} {state}{took}")
        if self._live is not None and self._task is not None:
            self._live.remove_task(self._task)
            self._task = None
        if self._live is not None and state == "started":
            # Until it says how many steps it has, the bar only moves to and fro.
            self._bar(str(stage), 0, None, "", "")

    def _progress(self, data: Json) -> None:
        eta = data.get("eta_s")
        eta_text = f"{duration(eta)} left" if isinstance(eta, int | float) else ""
        stage, step, steps = str(data.get("stage")), data.get("step") or 0, data.get("steps")
        metrics = metrics_text(data.get("metrics") or {})
        if self._live is not None:
            self._bar(stage, step, steps, metrics, eta_text)
            return
        parts = (f"{stage:<8} {step}/{steps or '?'}", metrics, eta_text)
        text = "  ".join(part for part in parts if part)
        if self._clock() - self._last_plain < PLAIN_EVERY_S:
            # Shown all the same if it turns out to be the stage's last one.
            self._held_back = text
            return
        self._held_back, self._last_plain = "", self._clock()
        self._line(text)

    def _bar(self, stage: str, step: int, steps: int | None, metrics: str, eta: str) -> None:
        assert self._live is not None
        fields: dict[str, Any] = {"stage": stage, "steps": steps or "?", "metrics": metrics, "eta": eta}
        if self._task is None:
            self._task = self._live.add_task("", total=steps, completed=step, **fields)
        else:
            self._live.update(self._task, total=steps, completed=step, **fields)

    def _line(self, text: str) -> None:
        self._out.print(text, soft_wrap=True)


class DownloadView(AbstractContextManager["DownloadView"]):
    """Shows files arriving: bars on a terminal, one line per finished file elsewhere."""

    def __init__(self, out: Console | None = None) -> None:
        self._out = out or console()
        self._bars: dict[str, TaskID] = {}
        self._live = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            console=self._out,
        )

    def __enter__(self) -> Self:
        if self._out.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._out.is_terminal:
            self._live.stop()

    def on_bytes(self, path: str, done: int, total: int) -> None:
        """`done` of `total` bytes of one file have arrived."""
        if not self._out.is_terminal:
            if done >= total:
                self._out.print(f"{path}  {size(total)}", soft_wrap=True)
            return
        if path not in self._bars:
            self._bars[path] = self._live.add_task(path, total=total)
        self._live.update(self._bars[path], completed=done)


def jobs_table(jobs: list[Json]) -> Table:
    """A list of jobs, as the server ordered them."""
    table = Table(box=None, pad_edge=False)
    for heading in ("job", "name", "status", "progress", "model", "method", "created", "note"):
        table.add_column(heading, overflow="fold", no_wrap=heading in ("job", "status", "created"))
    for job in jobs:
        progress = job.get("progress") or {}
        percent = progress.get("percent")
        done = "-" if percent is None else f"{progress.get('stage')} {percent:.0f}%"
        note = (job.get("error") or {}).get("code") or job.get("waiting_reason") or ""
        created = str(job.get("created_at") or "-")[:19].replace("T", " ")
        cells = (
            job["id"],
            job.get("name") or "-",
            job["status"],
            done,
            job.get("model"),
            job.get("method"),
            created,
        )
        table.add_row(*(str(cell) for cell in cells), note)
    return table


def perplexity_table(report: Json) -> Table:
    """Perplexities per evaluation set, lower is better."""
    table = Table(title="Perplexity (lower is better)", title_justify="left")
    table.add_column("evaluation text", overflow="fold")
    for heading in (
        "tokens",
        "teacher",
        "plain sign × mean",
        "start",
        "KBOP",
        "KL to teacher",
        "same top-1",
    ):
        table.add_column(heading, justify="right")
    for row in report.get("perplexity") or []:
        agreement = row.get("teacher_top1_agreement")
        table.add_row(
            str(row.get("set")),
            number(row.get("tokens")),
            *(number(row.get(key)) for key in ("teacher", "plain", "init", "kbop", "kl_to_teacher")),
            "-" if agreement is None else f"{100 * agreement:.1f} %",
        )
    return table


def facts_table(report: Json) -> Table:
    """Bits, sizes, times and memory of a report."""
    bits, sizes, times, memory = (report.get(key) or {} for key in ("bits", "size", "time", "memory"))
    training = report.get("training") or {}
    ratio = sizes.get("ratio")
    rows = [
        ("bits per weight, binary layers", number(bits.get("bits_per_binary_weight"))),
        ("bits per parameter, whole file", number(bits.get("bits_per_parameter_file"))),
        ("binary weights", number(bits.get("binary_weights"))),
        ("size before", size(sizes.get("teacher_bytes"))),
        (
            "size after",
            size(sizes.get("packed_bytes")) + ("" if ratio is None else f"  ({ratio:.2f} times smaller)"),
        ),
        ("training", f"{number(training.get('steps'))} steps, {number(training.get('tokens'))} tokens"),
        *((f"time, {stage}", duration(seconds)) for stage, seconds in (times.get("stages") or {}).items()),
        ("time, all", duration(times.get("total_s"))),
        ("peak memory", size(memory.get("peak_rss_bytes"))),
        ("peak GPU memory", size(memory.get("peak_cuda_bytes"))),
        ("training state per binary weight", _bytes(memory.get("training_state_bytes_per_binary_weight"))),
    ]
    table = Table(show_header=False, box=None, pad_edge=False)
    for label, value in rows:
        table.add_row(label, value)
    return table


def _bytes(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g} bytes"


def print_report(report: Json, out: Console | None = None) -> None:
    """The whole report as tables."""
    out = out or console()
    out.print(f"{report.get('job_id')}  {report.get('model')}")
    out.print(perplexity_table(report))
    out.print(facts_table(report))
