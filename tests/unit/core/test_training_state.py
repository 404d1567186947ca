"""Training checkpoints of one rank without an engine: what comes back, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kbop_core.engine import Engine
from kbop_core.errors import BadCheckpoint
from kbop_core.evidence import EvidenceKind
from kbop_core.kbop import KBOP
from kbop_core.schedules import FlipSchedule
from kbop_core.shard import Gang
from kbop_core.slices import Slice, SliceReader
from kbop_core.training_state import checkpoint_folder, load_state, save_state

SCHEDULE = FlipSchedule(0.1, 40, 2)
every_kind = pytest.mark.parametrize("kind", ["bfloat16", "int8"])


class NoEngine(Engine):
    """Nothing in full precision learns."""

    def __init__(self) -> None:
        pass

    def state(self) -> dict[str, Slice]:
        """Nothing to write."""
        return {}

    def load(self, saved: SliceReader, steps_done: int) -> None:
        """Nothing to read."""


def save(folder: Path, kbop: KBOP) -> Path:
    save_state(folder, kbop.steps_done, NoEngine(), kbop, Gang())
    return checkpoint_folder(folder, kbop.steps_done)


def held(kbop: KBOP) -> dict[str, Any]:
    tensors = {name: piece.rows.clone() for name, piece in kbop.state().items()}
    return tensors | {"unit": torch.tensor(kbop.unit, dtype=torch.float64)}


@every_kind
@pytest.mark.parametrize("columns", [1, 64, 129])
@pytest.mark.parametrize("momentum", [None, 0.0, 0.1, 0.9995])  # at 0.1 the evidence was rescaled before the checkpoint
def test_a_checkpoint_brings_back_bits_evidence_moments_and_unit(
    learner: Callable, tmp_path: Path, kind: EvidenceKind, columns: int, momentum: float | None
) -> None:
    saved = learner(5, columns, SCHEDULE, momentum=momentum, evidence=kind)
    for gradient in torch.randn(20, 5, columns, generator=torch.Generator().manual_seed(0)):
        saved.step(gradient)
    expected = held(saved.kbop)
    assert {n.split(".")[0] for n in expected} == {"bits", "evidence", "row", "column", "first_signs", "unit"}
    fresh = learner(5, columns, SCHEDULE, seed=1, momentum=momentum, evidence=kind)
    assert load_state(save(tmp_path, saved.kbop), NoEngine(), fresh.kbop) == fresh.kbop.steps_done == 20
    assert all(torch.equal(value, expected[name]) for name, value in held(fresh.kbop).items())


@every_kind
def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(
    learner: Callable, tmp_path: Path, kind: EvidenceKind
) -> None:
    stopped, fresh = (learner(5, 70, SCHEDULE, seed=seed, evidence=kind) for seed in (0, 1))
    stream = torch.randn(40, 5, 70, generator=torch.Generator().manual_seed(0))
    for gradient in stream[:15]:
        stopped.step(gradient)
    load_state(save(tmp_path, stopped.kbop), NoEngine(), fresh.kbop)
    for gradient in stream[15:]:
        assert stopped.step(gradient).flips == fresh.step(gradient).flips
    assert torch.equal(stopped.layer.weight, fresh.layer.weight)
    assert torch.equal(stopped.evidence, fresh.evidence)


@pytest.mark.parametrize(("written", "running"), [("bfloat16", "int8"), ("int8", "bfloat16")])
def test_a_checkpoint_with_the_other_kind_of_evidence_is_refused_in_words(
    learner: Callable, tmp_path: Path, written: EvidenceKind, running: EvidenceKind
) -> None:
    folder = save(tmp_path, learner(5, 70, SCHEDULE, evidence=written).kbop)
    other = learner(5, 70, SCHEDULE, seed=1, evidence=running)
    before = held(other.kbop)
    with pytest.raises(BadCheckpoint, match="another kind of evidence"):
        load_state(folder, NoEngine(), other.kbop)
    assert all(torch.equal(value, before[name]) for name, value in held(other.kbop).items())
