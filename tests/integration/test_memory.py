"""Jobs that save memory, and one that runs out of it: real ranks on a machine that takes one window at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jobs.failures import failure_from_json
from jobs.json_files import read_json
from jobs.spec import JobSpec

pytestmark = pytest.mark.timeout(180)

ROOT = Path(__file__).parents[2]
#: Job → its resources; four steps of four windows on one rank.
JOBS: dict[str, dict[str, Any]] = {
    "hungry": {"max_micro_batch": 2},
    "modest": {"max_micro_batch": 1},
    "offloaded": {"max_micro_batch": 1, "teacher": "offloaded"},
    "cached": {"max_micro_batch": 1, "teacher": "cached"},
    "thrifty": {"max_micro_batch": 1, "zero_stage": 3, "activation_checkpointing": True},
}
ATTEMPTS = ("hungry:1", "hungry:2", "modest:1", "offloaded:1", "cached:1", "thrifty:1")


@dataclass(frozen=True)
class Ended:
    """Jobs' folders in one folder, and the exit status of each attempt."""

    folder: Path
    codes: list[int]

    def student(self, job: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / job / "work/train/student.safetensors")


@pytest.fixture(scope="module")
def ended(tiny, tmp_path_factory) -> Ended:
    folder = tmp_path_factory.mktemp("jobs")
    method = {"tokens": 4 * 4 * 64, "batch_tokens": 4 * 64}
    for name, resources in JOBS.items():
        spec = tiny.spec(init="random", method=method, checkpoint_every=3, resources={"gpus": 1} | resources)
        (folder / name).mkdir()
        (folder / name / "spec.json").write_text(JobSpec.model_validate(spec).canonical_json())
    fixed = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "KBOP_DEVICE": "cpu",
        "DS_ACCELERATOR": "cpu",
    }
    command = [sys.executable, str(Path(__file__).with_name("hungry_ranks.py")), str(folder), *ATTEMPTS]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | fixed, timeout=170, check=False)
    told = (done.stdout.splitlines() or [""])[-1]
    assert told.startswith("exit codes"), done.stderr[-6000:]
    codes = [int(code) for code in told.split()[2:]]
    assert codes[1:] == [0] * 5, done.stderr[-6000:]
    return Ended(folder, codes)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_running_out_of_memory_ends_the_attempt_with_an_error_that_may_be_tried_again(ended: Ended) -> None:
    failure = failure_from_json(read_json(ended.folder / "hungry/attempts/1/error.json"))
    assert ended.codes[0] == 1 and failure is not None
    assert (failure.code, failure.may_retry) == ("out_of_memory", True)
    assert failure.message.endswith(
        "a micro-step of 2 windows does not fit into memory: CUDA out of memory. Tried to allocate 2.00 GiB."
    )
    assert failure.hint == "the next attempt takes half as many windows at a time"


def test_the_next_attempt_takes_half_as_many_windows_and_ends_as_if_it_had_begun_so(ended: Ended) -> None:
    assert read_json(ended.folder / "hungry/work/train/micro_batch.json") == {"windows": 1}
    assert not (ended.folder / "hungry/attempts/2/error.json").exists()
    assert same(ended.student("hungry"), ended.student("modest"))


def test_a_teacher_on_disk_gives_the_same_student(ended: Ended) -> None:
    assert same(ended.student("offloaded"), ended.student("modest"))


def losses(ended: Ended, job: str) -> list[float]:
    lines = (ended.folder / job / "work/train/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_stored_targets_teach_nearly_what_the_teacher_does(ended: Ended) -> None:
    """The first loss; later ones differ by flips that hung in the balance."""
    assert not (ended.folder / "cached/work/train/targets").exists()  # nobody will read them again
    first, other = losses(ended, "modest")[0], losses(ended, "cached")[0]
    assert 0.8 * first < other < first  # of 300 tokens it knows 64, and the rest as one


def test_divided_parameters_and_recomputed_blocks_save_a_whole_student_that_learned_the_same(ended: Ended) -> None:
    modest, thrifty = ended.student("modest"), ended.student("thrifty")
    assert {name: t.shape for name, t in thrifty.items()} == {name: t.shape for name, t in modest.items()}
    assert losses(ended, "thrifty") == pytest.approx(losses(ended, "modest"), rel=1e-4)
