"""How numbers, progress and errors look."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from service.display import (
    DownloadView,
    JobView,
    duration,
    error_text,
    jobs_table,
    metrics_text,
    number,
    size,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (3.74211, "3.742"), (0.00312, "0.00312"), (98.7, "98.7"), (1234.5, "1234"),
     (98765.4, "98,765"), (4096, "4,096"), (0, "0"), (0.0, "0"), (float("nan"), "nan"),
     (float("inf"), "inf")],
)  # fmt: skip
def test_numbers_have_four_digits(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (3 * 2**20, "3.00 MiB"),
        (2**41, "2048.00 GiB"),
    ],
)
def test_sizes_have_binary_units(value: float | None, text: str) -> None:
    assert size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (60, "1 m 00 s"),
        (3599.4, "59 m 59 s"),
        (3600, "1 h 00 m"),
    ],
)
def test_durations_are_short(value: float | None, text: str) -> None:
    assert duration(value) == text


def test_an_error_is_one_paragraph() -> None:
    assert error_text("it broke", "mend it", "broken") == "Error: it broke. Hint: mend it. [broken]"
    assert error_text("it broke!") == "Error: it broke!"


def test_metrics_that_are_missing_or_no_numbers_are_left_out() -> None:
    assert metrics_text({"loss": 1.5, "flip_rate": None, "tokens_per_s": 2048}) == "loss 1.5  tok/s 2048"


def progress(step: int, **more: Any) -> dict[str, Any]:
    return {"stage": "train", "step": step, "steps": 100, "eta_s": 61.0, "metrics": {"loss": 2.0}} | more


def test_without_a_terminal_progress_is_a_line_every_five_seconds() -> None:
    out, now = io.StringIO(), iter(float(i) for i in range(100))
    with JobView(Console(file=out, width=120), clock=lambda: next(now)) as view:
        for step in range(12):
            view.show("progress", progress(step))
    lines = out.getvalue().splitlines()
    assert lines[0] == "train    0/100  loss 2  1 m 01 s left" and 2 <= len(lines) <= 4


def test_on_a_terminal_there_is_a_bar_with_the_metrics() -> None:
    out = io.StringIO()
    with JobView(Console(file=out, width=120, force_terminal=True, markup=False, highlight=False)) as view:
        view.show("progress", progress(40))
        view.show("stage", {"stage": "[train]", "state": "finished", "seconds": 3.0})
    assert "40/100" in out.getvalue() and "loss 2" in out.getvalue() and "[train]  finished in 3.0 s" in out.getvalue()


@pytest.mark.parametrize("data", [{}, {"stage": None, "step": None, "steps": None, "eta_s": None, "metrics": None}])
@pytest.mark.parametrize("kind", ["progress", "stage", "status", "note", "something-new"])
@pytest.mark.parametrize("terminal", [True, False])
def test_events_with_nothing_in_them_do_not_stop_the_show(kind: str, data: dict[str, Any], terminal: bool) -> None:
    with JobView(Console(file=io.StringIO(), force_terminal=terminal)) as view:
        view.show(kind, data)


def test_a_stage_whose_steps_are_unknown_still_shows() -> None:
    out = io.StringIO()
    with JobView(Console(file=out, width=120, force_terminal=True)) as view:
        view.show("progress", progress(4, steps=None))
    assert "4/?" in out.getvalue()


def test_a_download_prints_one_line_per_file_without_a_terminal() -> None:
    out = io.StringIO()
    with DownloadView(Console(file=out, width=120)) as view:
        for done in (1024, 2048):
            view.on_bytes("a/model.bin", done, 2048)
    assert out.getvalue() == "a/model.bin  2.00 KiB\n"


def test_a_job_with_markup_in_its_name_is_listed_as_it_is() -> None:
    out = io.StringIO()
    job = {"id": "job_1", "status": "failed", "model": "[/x]", "error": {"code": "c"}, "progress": None}
    Console(file=out, width=120, markup=False).print(jobs_table([job]))
    assert "[/x]" in out.getvalue() and "job_1" in out.getvalue()
