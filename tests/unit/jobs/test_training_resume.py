"""How long ranks may wait for each other while the newest checkpoint is checked and loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jobs.stages import train
from jobs.workspace import GANG_TIMEOUT_S
from kbop_core.shard import Gang


def test_ranks_wait_as_long_as_between_stages_until_all_have_loaded_and_then_as_in_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    found = tmp_path / "step-00000004"
    monkeypatch.setattr(train, "limit_collectives", done.append)
    monkeypatch.setattr(train, "newest_state", lambda *_: done.append("checked") or found)
    monkeypatch.setattr(train, "load_state", lambda *_: done.append("loaded"))
    monkeypatch.setattr(train, "barrier", lambda _: done.append("all are ready"))
    journal = SimpleNamespace(note=lambda _: None)
    space: Any = SimpleNamespace(leads=True, journal=journal, device=torch.device("cpu"), gang=Gang())
    run: Any = SimpleNamespace(engine=None, kbop=None, gang=Gang())
    assert train._resume(space, run, tmp_path) == 4
    assert done == [GANG_TIMEOUT_S, "checked", "loaded", "all are ready", train.STEP_TIMEOUT_S]
