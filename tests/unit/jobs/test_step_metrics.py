"""What training writes about each step: the keys that are documented, and a file that survives a crash."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jobs.stages import step_metrics
from jobs.stages.step_metrics import StepJournal, keep_metrics, peak_resident_bytes, read_metrics
from jobs.training_series import SeriesQuery, read_series
from kbop_core.flops import ModelSize, flops_per_token, peak_flops
from kbop_core.kbop import FlipStats
from kbop_core.loop import StepMetrics
from kbop_core.phases import PHASES

DOCUMENT = Path(__file__).parents[3] / "docs" / "metrics.md"
STEP = StepMetrics(
    step=6,
    loss=0.25,
    stats=FlipStats({"a": 3, "b": 5}, {"a": 2, "b": 0}, 1000),
    seconds=dict.fromkeys(PHASES, 0.1234567),
)


class Told:
    """A journal that remembers."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, int, dict[str, Any]]] = []

    def progress(self, step: int, steps: int, **metrics: float) -> None:
        self.lines.append((step, steps, metrics))


class Space:
    """What StepJournal asks of a job's workspace: 512 tokens a step, 40 steps."""

    def __init__(self, folder: Path, device: str = "cpu", place: str = "resident", tied: bool = False) -> None:
        self.metrics_file, self.device, self.journal = folder / "metrics.jsonl", torch.device(device), Told()
        self.leads, self.steps, self.layout = True, 40, SimpleNamespace(tokens=512, context=64)
        self.gang, self.forgotten = SimpleNamespace(size=2), 0
        self.spec = SimpleNamespace(resources=SimpleNamespace(teacher=place))
        self.teacher: Any = torch.nn.ModuleDict({"table": torch.nn.Embedding(10, 4), "linear": torch.nn.Linear(4, 7)})
        self.teacher.get_input_embeddings = lambda: self.teacher["table"]
        self.teacher.config = SimpleNamespace(num_hidden_layers=3, hidden_size=4, tie_word_embeddings=tied)

    def forget_teacher(self) -> None:
        self.forgotten += 1


@pytest.fixture
def a100(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a GPU that is not there, and a clock on which each look takes two seconds."""
    name, seconds = "NVIDIA A100-SXM4-80GB", iter(range(0, 100, 2))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 77)
    monkeypatch.setattr(step_metrics.time, "monotonic", lambda: float(next(seconds)))
    return name


def documented() -> set[str]:
    _, _, table = DOCUMENT.read_text(encoding="utf-8").partition("| key |")
    return set(re.findall(r"^\| `([a-z_.]+)`", table.split("\n\n")[0], re.MULTILINE))


def flat(line: dict[str, Any]) -> set[str]:
    return line.keys() - {"seconds"} | {f"seconds.{phase}" for phase in line["seconds"]}


def test_a_line_has_the_documented_keys_and_the_first_is_the_step(tmp_path: Path) -> None:
    space: Any = Space(tmp_path)
    StepJournal(space, start=0).tell(STEP)
    (text,) = space.metrics_file.read_text().splitlines()
    assert text.startswith('{"step": 6,')  # what readers find without parsing the layers
    assert flat(json.loads(text)) == documented() - {"mfu"}  # of GPUs only


def test_a_line_on_a_gpu_has_every_documented_key(tmp_path: Path, a100: str) -> None:
    space: Any = Space(tmp_path, "cuda")
    StepJournal(space, start=0).tell(STEP)
    (line,) = read_metrics(space.metrics_file)
    assert flat(line) == documented() and line["peak_bytes"] == 77


def test_the_numbers_are_those_of_the_step(tmp_path: Path) -> None:
    space: Any = Space(tmp_path)
    StepJournal(space, start=0).tell(STEP)
    (line,) = read_metrics(space.metrics_file)
    assert (line["loss"], line["flip_rate"], line["reversal_rate"]) == (0.25, 8 / 1000, 2 / 8)
    assert (line["flips"], line["reversals"]) == ({"a": 3, "b": 5}, {"a": 2, "b": 0})
    assert line["seconds"] == dict.fromkeys(PHASES, 0.123457)
    assert 0 < line["peak_bytes"] <= peak_resident_bytes()


def test_without_flips_there_are_no_reversals_and_no_division_by_zero(tmp_path: Path) -> None:
    space: Any = Space(tmp_path)
    StepJournal(space, start=0).tell(StepMetrics(0, 0.1, FlipStats({"a": 0}, {"a": 0}, 10), {}))
    assert read_metrics(space.metrics_file)[0]["reversal_rate"] == 0


def test_progress_tells_the_same_with_a_number_for_each_phase(tmp_path: Path) -> None:
    space: Any = Space(tmp_path)
    StepJournal(space, start=0).tell(STEP)
    ((done, steps, metrics),) = space.journal.lines
    assert (done, steps) == (7, 40)
    told = {"loss", "flip_rate", "reversal_rate", "tokens_per_s", "peak_bytes"}
    assert metrics.keys() == told | {f"{phase}_s" for phase in PHASES}


def test_ranks_that_do_not_lead_write_nothing(tmp_path: Path) -> None:
    space: Any = Space(tmp_path)
    space.leads = False
    StepJournal(space, start=0).tell(STEP)
    assert not space.metrics_file.exists() and not space.journal.lines


@pytest.mark.parametrize(("place", "live"), [("resident", True), ("offloaded", True), ("cached", False)])
@pytest.mark.parametrize("tied", [True, False])
def test_speed_and_utilization_count_the_steps_of_this_attempt(
    place: str, live: bool, tied: bool, tmp_path: Path, a100: str
) -> None:
    space: Any = Space(tmp_path, "cuda", place, tied)
    StepJournal(space, start=4).tell(STEP)  # three steps in two seconds
    (line,) = read_metrics(space.metrics_file)
    speed, peak = 3 * 512 / 2.0, peak_flops(a100)
    assert line["tokens_per_s"] == speed and peak is not None
    size = ModelSize(35 + (40 if tied else 0), layers=3, width=4)  # a table that is only looked up costs nothing
    assert step_metrics._utilization_per_token(space) == flops_per_token(size, 64, live) / (2 * peak)
    assert bool(space.forgotten) == (place == "cached")


def write_lines(path: Path, steps: range, tail: str = "") -> None:
    path.write_text("".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in steps) + tail)


@pytest.mark.parametrize("tail", ["", '{"step": 6, "lo', '{"step": 6, "lo\n{"step": 7, "loss": 1.0}\n', "\0\0\0\n"])
def test_steps_are_read_up_to_a_torn_line(tail: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", range(6), tail)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(6))


@pytest.mark.parametrize(("steps", "left"), [(0, 0), (4, 4), (6, 6), (9, 6)])
def test_an_attempt_keeps_the_lines_before_its_start_alone(steps: int, left: int, tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", range(6), '{"step": 6, "lo')
    keep_metrics(tmp_path / "metrics.jsonl", steps)
    assert [s.step for s in read_series(tmp_path / "metrics.jsonl", SeriesQuery()).steps] == list(range(left))


def test_without_a_file_an_empty_one_is_begun(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "train/metrics.jsonl") == []
    keep_metrics(tmp_path / "train/metrics.jsonl", 0)
    assert (tmp_path / "train/metrics.jsonl").read_text() == ""
