"""The teacher of stage `train` is made where the spec asks for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from jobs.stages import teacher
from jobs.workspace import Workspace


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
