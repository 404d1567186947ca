"""docs/plan.md shows what its commands print, and nothing older."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer.testing

from benchmarks import plan
from benchmarks.plan import CONFIGURATIONS, DOCUMENT
from benchmarks.record import RESULTS
from service import cli


def table_rows(text: str) -> list[list[str]]:
    body = text.split(plan.BEGIN)[1].split(plan.END)[0].strip().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body]


def test_the_table_of_known_models_is_the_one_the_command_prints() -> None:
    printed = typer.testing.CliRunner().invoke(cli.app, ["plan", "--table"]).stdout
    lines = [line.rstrip() for line in printed.splitlines()]
    assert len(lines) > 20 and "\n".join(lines) in DOCUMENT.read_text(encoding="utf-8")


def test_the_validation_table_holds_the_rows_of_the_last_run() -> None:
    rows = json.loads((RESULTS / "plan.json").read_text(encoding="utf-8"))["rows"]
    heading, _, *shown = table_rows(DOCUMENT.read_text(encoding="utf-8"))
    assert heading == list(rows[0]) and shown == [[str(v) for v in row.values()] for row in rows]
    assert [row["name"] for row in rows] == [config.name for config in CONFIGURATIONS]


def test_a_run_replaces_only_what_stands_between_the_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "plan.md"
    file.write_text(f"before\n{plan.BEGIN}\nold\n{plan.END}\nafter\n")
    monkeypatch.setattr(plan, "DOCUMENT", file)
    plan.document([{"name": "x", "peak": 1.5}])
    text = file.read_text()
    assert table_rows(text) == [["name", "peak"], ["---", "---"], ["x", "1.5"]]
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
