"""The training series is read thinned, from a file that grows, without a torn line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.training_series import SeriesQuery, TrainingSeries, read_series


def line(step: int, **more: Any) -> str:
    return (
        json.dumps({"step": step, "loss": 1.0 / (step + 1), "flips": {"a": step}, "reversals": {"a": 0}} | more) + "\n"
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def write(path: Path, steps: range) -> Path:
    path.write_text("".join(line(step) for step in steps))
    return path


def numbers(series: TrainingSeries) -> list[int]:
    return [step.step for step in series.steps]


def test_without_a_file_there_are_no_steps(path):
    assert read_series(path, SeriesQuery()) == TrainingSeries((), 1)


def test_an_empty_file_has_no_steps(path):
    path.touch()
    assert read_series(path, SeriesQuery(since=3)).steps == ()


def test_a_short_series_is_shown_whole(path):
    series = read_series(write(path, range(7)), SeriesQuery(limit=7))
    assert numbers(series) == list(range(7)) and series.every == 1 and series.steps[1].loss == 0.5


@pytest.mark.parametrize(("limit", "every"), [(100, 1), (99, 2), (50, 2), (49, 4), (10, 16), (1, 128)])
def test_every_doubles_until_the_limit_holds_and_the_newest_is_kept(path, limit, every):
    series = read_series(write(path, range(100)), SeriesQuery(limit=limit))
    assert series.every == every and len(series.steps) <= limit + 1
    assert numbers(series) == sorted({*range(0, 100, every), 99})


def test_an_asked_distance_is_the_least_one(path):
    series = read_series(write(path, range(100)), SeriesQuery(every=30, limit=2))
    assert (numbers(series), series.every) == ([0, 60, 99], 60)


@pytest.mark.parametrize("since", [0, 1, 8, 9, 10, 99, 100, 101, 998, 999])
def test_since_begins_at_that_step_wherever_its_line_is(path, since):
    assert numbers(read_series(write(path, range(1000)), SeriesQuery(since=since, limit=1000))) == list(
        range(since, 1000)
    )


def test_a_series_that_has_not_come_so_far_is_empty(path):
    assert read_series(write(path, range(10)), SeriesQuery(since=10)).steps == ()


def test_since_between_steps_begins_at_the_next(path):
    path.write_text("".join(line(step) for step in range(0, 100, 10)))
    assert numbers(read_series(path, SeriesQuery(since=41)))[0] == 50


def test_until_ends_the_window_and_its_last_step_is_the_newest_shown(path):
    series = read_series(write(path, range(100)), SeriesQuery(since=20, until=33, every=8))
    assert numbers(series) == [24, 32, 33]


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_torn_last_line_is_left_out(path, cut):
    whole = line(0) + line(1) + line(2)
    path.write_text(whole[:-cut])
    assert numbers(read_series(path, SeriesQuery())) == [0, 1]
    assert read_series(path, SeriesQuery(since=2)).steps == ()


def test_a_line_appears_when_it_is_complete(path):
    path.write_text(line(0) + line(1)[:9])
    with path.open("a") as file:
        file.write(line(1)[9:])
    assert numbers(read_series(path, SeriesQuery())) == [0, 1]


@pytest.mark.parametrize(
    "damaged", ["{}\n", "\n", "nonsense\n", '{"step": 1, "loss": 3\n', '{"step": 1, "loss": "x"}\n']
)
def test_a_line_that_is_no_step_is_passed_over(path, damaged):
    path.write_text(line(0) + damaged + line(2))
    assert numbers(read_series(path, SeriesQuery())) == [0, 2]
    assert numbers(read_series(path, SeriesQuery(since=1)))[-1:] == [2]


def test_lines_of_lost_steps_behind_a_newer_one_are_passed_over(path):
    path.write_text(line(0) + line(1) + line(1) + line(0) + line(2))
    assert numbers(read_series(path, SeriesQuery(limit=1))) == [0, 2]


def test_layers_come_only_when_asked_for(path):
    write(path, range(3))
    plain, full = (read_series(path, SeriesQuery(layers=asked)).steps[2] for asked in (False, True))
    assert (plain.flips, plain.reversals) == (None, None)
    assert (full.flips, full.reversals) == ({"a": 2}, {"a": 0})


def test_a_loss_that_is_not_finite_is_missing(path):
    path.write_text('{"step": 0, "loss": NaN}\n{"step": 1, "loss": Infinity}\n')
    assert [step.loss for step in read_series(path, SeriesQuery()).steps] == [None, None]


def test_older_lines_lack_keys_and_newer_ones_may_have_more(path):
    path.write_text('{"step": 0, "loss": 2.0}\n' + line(1, seconds={"forward": 0.5, "new": 1}, peak_bytes=7, other=[]))
    old, new = read_series(path, SeriesQuery()).steps
    assert (old.seconds, old.peak_bytes, new.peak_bytes) == (None, None, 7)
    assert new.seconds is not None and (new.seconds.forward, new.seconds.flips) == (0.5, None)


#: Prints the most bytes that Python held while it read a series, in a process that shows what it imported.
MEASURE = """
import sys, tracemalloc
from pathlib import Path
from jobs.training_series import SeriesQuery, read_series
tracemalloc.start()
series = read_series(Path(sys.argv[1]), SeriesQuery(layers=True))
assert series.steps[-1].step == 99_999 and len(series.steps) <= 501 and "torch" not in sys.modules
print(tracemalloc.get_traced_memory()[1])
"""


def test_a_hundred_thousand_steps_are_read_without_torch_in_a_fraction_of_their_size(path):
    layers = {f"model.layers.{i}.mlp.down_proj": 12 for i in range(8)}
    with path.open("w") as file:
        file.writelines(line(step, flips=layers, reversals=layers) for step in range(100_000))
    command = [sys.executable, "-c", MEASURE, str(path)]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < path.stat().st_size / 20
