"""How a rank words what ended it, for error.json."""

from __future__ import annotations

import errno

import pytest
import torch

from jobs.errors import JobsError
from jobs.rank_main import describe
from kbop_core.errors import NonFiniteLoss, OutOfMemory


@pytest.mark.parametrize("windows", [1, 8])
def test_a_micro_step_that_does_not_fit_is_tried_again_as_long_as_it_can_be_halved(windows: int) -> None:
    known = describe(OutOfMemory(windows, "CUDA out of memory."))
    assert known is not None
    assert (known.code, known.origin, known.retryable) == ("out_of_memory", "system", windows > 1)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    ],
)
def test_memory_that_runs_out_elsewhere_is_named_and_not_tried_again(error: Exception) -> None:
    known = describe(error)
    assert known is not None
    assert (known.code, known.origin, known.retryable) == ("out_of_memory", "system", False)
    assert known.message.startswith("the memory does not suffice: ") and "\n" not in known.message
    assert "resources.teacher" in known.hint


@pytest.mark.parametrize(
    ("error", "code", "origin"),
    [
        (NonFiniteLoss("the loss is nan", "lower the rates"), "non_finite_loss", "user"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full", "system"),
        (RuntimeError("EADDRINUSE, message: address already in use"), "port_taken", "system"),
    ],
)
def test_known_errors_keep_their_codes(error: Exception, code: str, origin: str) -> None:
    known = describe(error)
    assert known is not None
    assert (known.code, known.origin) == (code, origin)


def test_an_error_of_jobs_is_the_users_to_repair() -> None:
    known = describe(JobsError("no such model"))
    assert known is not None
    assert (known.origin, known.retryable) == ("user", False)


@pytest.mark.parametrize("error", [RuntimeError("connection closed by peer"), KeyError("x"), ValueError("no memory")])
def test_what_nobody_expected_is_left_to_the_log(error: Exception) -> None:
    assert describe(error) is None
