"""The teacher of stage `train` is made where the spec asks for it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from jobs import workspace
from jobs.spec import JobSpec
from jobs.stages import teacher
from jobs.workspace import Workspace
from kbop_core.shard import Gang


def test_a_teacher_that_is_divided_replaces_the_one_that_stages_before_used(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(teacher, "share_frozen", lambda model: done.append(f"divided {model}"))
    space: Any = SimpleNamespace(
        spec=SimpleNamespace(resources=SimpleNamespace(teacher="sharded")),
        forget_teacher=lambda: done.append("forgotten"),
        fresh_model=lambda: "model",
    )
    teacher.training_teacher(cast(Workspace, space))
    assert done == ["forgotten", "divided model"]


def test_a_teacher_that_was_let_go_is_not_loaded_again_to_plan_the_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(Workspace, "fresh_model", lambda self: loaded.append("teacher"))
    monkeypatch.setattr(workspace, "plan_conversion", lambda *_: "plan")
    spec = JobSpec.model_validate({"model": "m", "data": [{"source": "d"}]})
    space = Workspace(tmp_path, spec, 2, Gang(), torch.device("cpu"), cast(Any, None))
    space.forget_teacher()
    assert cast(Any, space.plan) == "plan" and loaded == ["teacher"] and "teacher" not in vars(space)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_teacher_fits_whole_only_with_the_logits_that_it_makes(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    space: Any = SimpleNamespace(teacher=nn.Linear(10, 9), device=torch.device("cpu"), gang=Gang(0, ranks))
    needed = ranks * (4 * 99 + 3 * 4 * 1000)
    free = iter((needed, needed + 1))
    monkeypatch.setattr(teacher, "free_bytes", lambda device: next(free))
    assert [teacher.fits_whole(space, 1000) for _ in range(2)] == [False, True]
