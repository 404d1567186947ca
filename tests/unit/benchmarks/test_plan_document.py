"""docs/plan.md shows what its commands print, and nothing older."""

from __future__ import annotations

import json

import typer.testing

from benchmarks.plan import COMMAND, CONFIGURATIONS, DOCUMENT
from benchmarks.record import RESULTS, markdown
from service import cli


def test_the_table_of_known_models_is_the_one_the_command_prints() -> None:
    printed = typer.testing.CliRunner().invoke(cli.app, ["plan", "--table"]).stdout
    lines = [line.rstrip() for line in printed.splitlines()]
    assert len(lines) > 20 and "\n".join(lines) in DOCUMENT.read_text(encoding="utf-8")


def test_the_validation_table_holds_the_rows_of_the_last_run() -> None:
    rows = json.loads((RESULTS / "plan.json").read_text(encoding="utf-8"))["rows"]
    assert f"by {COMMAND} -->\n{markdown(rows)}\n<!-- validation: end -->" in DOCUMENT.read_text(encoding="utf-8")
    assert [row["name"] for row in rows] == [config.name for config in CONFIGURATIONS]
