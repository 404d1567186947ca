"""What a user is told when ranks fail."""

from __future__ import annotations

import json

import pytest

from jobs.failures import GangEnd, failure_from_json, failure_of_ranks, log_tail, runner_lost


def write_error(folder, **fields):
    wire = {"code": "no_linears", "message": "nothing to binarize", "origin": "user", "retryable": False}
    (folder / "error.json").write_text(json.dumps(wire | fields))


def test_a_known_error_is_told_in_the_ranks_own_words_with_its_log(tmp_path):
    write_error(tmp_path, hint="choose another model")
    (tmp_path / "rank1.log").write_text("Traceback\n")
    failure = failure_of_ranks(GangEnd((-15, 1), first_failed=(1,)), tmp_path)
    assert (failure.code, failure.hint, failure.log_tail) == (
        "no_linears",
        "choose another model",
        "Traceback",
    )
    assert not failure.may_retry


def test_an_echo_of_a_killed_rank_does_not_hide_the_kill(tmp_path):
    write_error(tmp_path, message="connection closed by peer")
    failure = failure_of_ranks(GangEnd((1, -9), first_failed=(1,)), tmp_path)
    assert failure.code == "rank_killed" and "rank 1 was killed by SIGKILL" in failure.message
    assert failure.may_retry


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (-9, "rank_killed"),
        (-11, "rank_killed"),
        (-63, "rank_killed"),
        (75, "rank_stopped"),
        (1, "rank_crashed"),
        (2, "rank_crashed"),
    ],
)
def test_an_end_without_explanation_is_the_systems_fault(tmp_path, code, expected):
    failure = failure_of_ranks(GangEnd((0, code), first_failed=(1,)), tmp_path)
    assert (failure.code, failure.origin, failure.may_retry) == (expected, "system", True)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"code": 1, "message": "x"}', '{"code": "x"}'])
def test_a_damaged_error_file_is_no_explanation(tmp_path, text):
    (tmp_path / "error.json").write_text(text)
    assert failure_of_ranks(GangEnd((1,), first_failed=(0,)), tmp_path).code == "rank_crashed"


def test_the_log_tail_is_the_last_forty_lines_of_any_bytes(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"\xff\n" * 50_000 + b"".join(b"%d\n" % i for i in range(50)))
    assert log_tail(path).splitlines() == [str(i) for i in range(10, 50)]
    assert log_tail(tmp_path / "none") == ""


def test_a_lost_runner_that_noted_its_error_is_believed(tmp_path):
    known = failure_from_json({"code": "no_linears", "message": "x", "origin": "user"})
    (tmp_path / "exit.json").write_text(json.dumps({"status": "failed", "error": known.as_dict()}))
    assert runner_lost(tmp_path, tmp_path / "runner.log") == known


def test_a_lost_runner_without_a_note_is_retried(tmp_path):
    assert runner_lost(tmp_path, tmp_path / "runner.log").may_retry
