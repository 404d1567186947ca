"""docs/metrics.md lists what there is: metrics with types and labels, keys of the series, parameters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jobs.records import Failure
from jobs.training_series import PHASES, SeriesQuery, TrainingStep
from service.exporter import JOB_GAUGES

if TYPE_CHECKING:
    from tests.unit.service.conftest import Server

DOCUMENT = Path(__file__).parents[3] / "docs" / "metrics.md"


def rows(heading: str) -> list[list[str]]:
    """Cells of the table whose first column has this heading."""
    _, _, table = DOCUMENT.read_text(encoding="utf-8").partition(f"| {heading} |")
    body = table.split("\n\n")[0].splitlines()[2:]
    assert body
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body]


def names(cell: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", cell))


def everything(server: Server) -> str:
    """A scrape in which every metric has a sample."""
    server.submit()
    server.store.fail(server.claim(), Failure("c", "m", retryable=False), max_attempts=1, retry_delay_s=1)
    server.submit()
    metrics: dict[str, Any] = dict.fromkeys(
        ("loss", "flip_rate", "reversal_rate", "tokens_per_s", "peak_bytes", "mfu"), 1
    )
    progress = {"stage": "train", "step": 1, "steps": 2, "eta_s": 1.0}
    server.store.append(server.claim(), [], progress=progress | {"metrics": metrics | {f"{p}_s": 1.0 for p in PHASES}})
    server.http.get("/healthz")
    return server.http.get("/metrics").text


def test_every_metric_is_documented_with_its_type_and_labels(server: Server) -> None:
    found = {}
    for family in text_string_to_metric_families(everything(server)):
        assert family.samples, family.name
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {label for sample in family.samples for label in sample.labels if label != "le"}
        found[name] = (family.type, labels)
    assert found == {row[0].strip("`"): (row[1], names(row[2])) for row in rows("metric")}
    assert {gauge.name for gauge in JOB_GAUGES} <= found.keys()


def test_every_key_of_the_series_is_documented() -> None:
    keys = set(TrainingStep.model_fields) - {"seconds"} | {f"seconds.{phase}" for phase in PHASES}
    assert keys == {row[0].strip("`") for row in rows("key")}


def test_every_parameter_is_documented_with_its_default(server: Server) -> None:
    route = server.http.get("/openapi.json").json()["paths"]["/v1/jobs/{job_id}/metrics"]["get"]
    defaults = {p["name"]: p["schema"].get("default") for p in route["parameters"] if p["in"] == "query"}
    as_text = {name: "none" if default is None else str(default).lower() for name, default in defaults.items()}
    assert as_text == {row[0].strip("`"): row[1] for row in rows("parameter")}
    assert defaults == {name: getattr(SeriesQuery(), name) for name in defaults}


@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_is_named_with_its_metric(phase: str) -> None:
    (row,) = [row for row in rows("metric") if row[0] == "`kbop_job_phase_seconds`"]
    assert phase in row[3]
