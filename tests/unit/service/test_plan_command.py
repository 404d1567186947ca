"""`kbop plan`: without a server, without torch, with errors in words."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.testing

from jobs.errors import BadPlan
from service import cli
from service.planning import parse_size


@pytest.fixture
def plan() -> Callable[..., Any]:
    """Runs `kbop plan`."""
    return lambda *arguments: typer.testing.CliRunner().invoke(cli.app, ["plan", *(str(a) for a in arguments)])


def test_a_plan_shows_memory_by_part_and_says_that_time_is_not_known(plan: Callable[..., Any]) -> None:
    shown = plan("8B", "--gpus", 8, "--gpu-memory", "80GB").stdout
    assert "8,190,735,360 parameters" in shown and "fits" in shown and "yes: " in shown
    assert "Peak of a rank: loss" in shown and "activations" in shown and "nobody gave a throughput" in shown


def test_a_plan_that_does_not_fit_says_what_would_help(plan: Callable[..., Any]) -> None:
    shown = plan("8B", "--gpu-memory", "24GB").stdout
    assert "no: " in shown and "with activation checkpointing" in shown and "with teacher offloaded" in shown


def test_a_plan_that_does_not_fit_names_a_way_that_does(plan: Callable[..., Any]) -> None:
    assert "fits as" in plan("1.7B", "--gpu-memory", "20GB").stdout
    assert "least of all ways" in plan("70B", "--gpu-memory", "24GB").stdout


def test_options_replace_what_the_spec_file_says(plan: Callable[..., Any], tmp_path: Path) -> None:
    spec = {"model": "0.6B", "data": [{"source": "builtin:python-docs"}], "method": {"evidence": "int8"}}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    told = json.loads(plan("--spec", tmp_path / "spec.json", "--gpus", 4, "--zero-stage", 3, "--json").stdout)
    request = told["request"]
    assert (request["evidence"], request["ranks"], request["zero_stage"]) == ("int8", 4, 3)


def test_the_built_in_model_is_planned_from_its_weight_files(plan: Callable[..., Any]) -> None:
    told = json.loads(plan("builtin:demo", "--device", "cpu", "--json").stdout)
    assert (told["binary_weights"], told["sizes"], told["request"]["device"]) == (
        786_432,
        "from the weight files",
        "cpu",
    )


@pytest.mark.parametrize(
    ("options", "tokens_per_s", "source"),
    [(["--tokens-per-s", 500], 500, "stated"), (["--flops-per-s", 1e15, "--utilization", 0.5], None, "derived")],
)
def test_time_follows_from_the_throughput_that_is_given(
    plan: Callable[..., Any], options: list[Any], tokens_per_s: float | None, source: str
) -> None:
    time = json.loads(plan("0.6B", "--tokens", 1000, *options, "--json").stdout)["time"]
    assert time["source"].startswith(source) and time["seconds"] == pytest.approx(1000 / time["tokens_per_s"])
    assert tokens_per_s is None or time["tokens_per_s"] == tokens_per_s


def test_an_earlier_report_gives_the_throughput(plan: Callable[..., Any], tmp_path: Path) -> None:
    report = {"job_id": "job_1", "training": {"tokens": 100}, "time": {"stages": {"train": 2.0}}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert "measured in job job_1" in plan("0.6B", "--report", tmp_path / "report.json").stdout


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        ([], 2, "--model"),
        (["0.6B", "--gpus", "0"], 2, "/resources/gpus"),
        (["./nowhere"], 1, "config.json"),
        (["owner/name"], 1, "[unknown_model]"),
        (["0.6B", "--gpu-memory", "much"], 1, "80GB"),
        (["0.6B", "--device", "tpu"], 1, "cuda, cpu"),
        (["0.6B", "--teacher", "moon"], 1, "resident"),
        (["0.6B", "--zero-stage", "9"], 1, "zero_stage is 9"),
        (["0.6B", "--flops-per-s", "1e15"], 1, "--utilization"),
        (["0.6B", "--tokens-per-s", "0"], 1, "above 0"),
        (["0.6B", "--tokens-per-s", "5", "--report", "x.json"], 1, "several"),
        (["0.6B", "--report", "nowhere.json"], 1, "not a report"),
        (["0.6B", "--set", "method.effort=quick"], 1, "quick"),
    ],
)
def test_bad_input_is_one_sentence(plan: Callable[..., Any], arguments: list[str], exit_code: int, words: str) -> None:
    result = plan(*arguments)
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert words in result.stderr and result.stderr.startswith("Error: ") and "Traceback" not in result.stderr


@pytest.mark.parametrize(("text", "size"), [("80GB", 80 * 10**9), ("24 GiB", 24 * 2**30), ("1.5gb", 1_500_000_000)])
def test_sizes_are_numbers_with_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "80 gallons"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(BadPlan):
        parse_size(text)


def test_the_table_names_every_known_model_on_every_machine(plan: Callable[..., Any]) -> None:
    shown = plan("--table").stdout
    assert all(shown.count(f"│ {name} ") == 4 for name in ("0.6B", "1.7B", "8B", "32B", "70B"))
    assert shown.count("2 × 8 × 80 GB") == 5


def test_planning_loads_no_torch() -> None:
    run = "import sys; from service.cli import app; app(['plan', '8B'], standalone_mode=False)"
    script = run + "; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "'torch'" not in done.stdout and "'kbop_core'" not in done.stdout and "parameters" in done.stdout
