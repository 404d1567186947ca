"""The whole path on real ranks: DeepSpeed engine, binary layers, flips, checkpoints and how they fail."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kbop_core.slices import SliceReader
from kbop_core.training_state import KEEP, checkpoint_folder, newest_state, step_of

Outcome = Callable[[int, str, int], Any]
RunFolder = Callable[[int], Path]
SIZES = [1, 2, 3]


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


# -- world size -------------------------------------------------------------------------------------------------------


def test_the_whole_engine_flips_the_same_signs_on_one_rank_and_on_two(outcome: Outcome) -> None:
    alone = outcome(1, "dyadic_engine", 0)
    for rank in range(2):
        shared = outcome(2, "dyadic_engine", rank)
        assert shared["flips"] == alone["flips"]
        assert all(differing(a, b) == [] for a, b in zip(shared["bits"], alone["bits"], strict=True))
    assert all(sum(flips.values()) > 0 for flips in alone["flips"])


def test_the_exact_run_really_kept_its_scales_at_one(outcome: Outcome) -> None:
    assert all(bool((scale == 1).all()) for scale in outcome(2, "dyadic_engine", 1)["scales"])


def test_two_micro_steps_of_one_window_flip_the_same_signs_as_one_of_two(outcome: Outcome) -> None:
    once, twice = outcome(1, "accumulated", 0)[1], outcome(1, "accumulated", 0)[2]
    assert twice["flips"] == once["flips"]
    assert all(differing(a, b) == [] for a, b in zip(twice["bits"], once["bits"], strict=True))
    assert differing(twice["rows"], once["rows"]) == []  # mean squares: the gradients had the same size, too
    assert all(sum(flips.values()) > 0 for flips in once["flips"])


# -- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_a_resumed_run_ends_with_the_very_same_bits_scales_and_evidence(size: int, outcome: Outcome) -> None:
    for rank in range(size):
        found = outcome(size, "resume", rank)
        assert found["start"] == 3
        assert differing(found["resumed"], found["went_on"]) == []
        assert found["resumed_losses"] == found["losses"][3:]


@pytest.mark.parametrize("size", SIZES)
def test_what_is_loaded_is_what_was_saved(size: int, outcome: Outcome) -> None:
    for rank in range(size):
        found = outcome(size, "resume", rank)
        assert differing(found["loaded"], found["saved"]) == []
        assert found["warnings"] == []


@pytest.mark.parametrize("size", SIZES)
def test_the_steps_after_the_checkpoint_really_changed_bits_scales_and_norms(size: int, outcome: Outcome) -> None:
    found = outcome(size, "resume", 0)
    changed = differing(found["went_on"], found["saved"])
    for kind in ("bits.", "evidence.", ".weight_scale", "norm.weight", "embed_tokens.weight"):
        assert any(kind in name for name in changed), kind


@pytest.mark.parametrize("size", SIZES)
def test_ranks_agree_on_everything_but_their_shards(size: int, outcome: Outcome) -> None:
    first = {n: t for n, t in outcome(size, "resume", 0)["went_on"].items() if not n.startswith("evidence.")}
    for rank in range(size):
        found = outcome(size, "resume", rank)
        assert differing({n: found["went_on"][n] for n in first}, first) == []
        assert found["losses"] == outcome(size, "resume", 0)["losses"]


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("size", [1, 2])
def test_resuming_is_exact_with_every_zero_stage(stage: int, size: int, outcome: Outcome) -> None:
    for rank in range(size):
        found = outcome(size, "zero_stages", rank)[stage]
        assert differing(found["resumed"], found["went_on"]) == []
        assert found["resumed_losses"] == found["losses"][3:]


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("size", [1, 2])
def test_the_zero_stage_decides_where_things_are_not_what_they_become(stage: int, size: int, outcome: Outcome) -> None:
    usual, other = outcome(size, "resume", 0)["went_on"], outcome(size, "zero_stages", 0)[stage]["went_on"]
    for name, tensor in usual.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_student_whose_config_asks_for_dropout_trains_without_it(outcome: Outcome) -> None:
    first, second = outcome(1, "dropout", 0)
    assert first == second


def test_training_lowers_the_loss(outcome: Outcome) -> None:
    losses = outcome(1, "resume", 0)["losses"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("size", SIZES)
def test_only_the_newest_checkpoints_are_kept(size: int, run_folder: RunFolder) -> None:
    folder = run_folder(size) / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000002", "step-00000003"]
    assert KEEP == 2
    newest = newest_state(folder, lambda _: None)
    assert newest == checkpoint_folder(folder, 3)
    assert step_of(newest) == 3


@pytest.mark.parametrize("size", SIZES)
def test_the_manifest_lists_every_file_of_the_checkpoint(size: int, run_folder: RunFolder) -> None:
    folder = run_folder(size) / "checkpoints" / "step-00000003"
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert (manifest["step"], manifest["ranks"]) == (3, size)
    assert manifest["files"].keys() == files - {"manifest.json"}
    assert {f"rank-{rank}.safetensors" for rank in range(size)} < files


# -- damaged checkpoints ----------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoints(tmp_path: Path, run_folder: RunFolder) -> Path:
    """A copy of what two ranks wrote: steps 2 and 3."""
    return Path(shutil.copytree(run_folder(2) / "checkpoints", tmp_path / "checkpoints"))


def newest_name(folder: Path) -> tuple[str | None, list[str]]:
    warnings: list[str] = []
    newest = newest_state(folder, warnings.append)
    return newest and newest.name, warnings


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage", ["a changed byte", "cut off", "a missing file", "no manifest", "half a manifest", "[] as manifest"]
)
def test_a_damaged_newest_checkpoint_is_skipped_for_the_one_before(damage: str, checkpoints: Path) -> None:
    path = checkpoints / "step-00000003" / ("manifest.json" if "manifest" in damage else "rank-1.safetensors")
    if damage == "a changed byte":
        flip_a_byte(path)
    elif damage in ("cut off", "half a manifest"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "[] as manifest":
        path.write_text("[]")
    else:
        path.unlink()
    newest, warnings = newest_name(checkpoints)
    assert newest == "step-00000002"
    assert len(warnings) == 1
    assert "step-00000003 skipped" in warnings[0]


def test_with_every_checkpoint_damaged_there_is_none(checkpoints: Path) -> None:
    for folder in checkpoints.glob("step-*"):
        flip_a_byte(folder / "rank-0.safetensors")
    newest, warnings = newest_name(checkpoints)
    assert newest is None
    assert len(warnings) == 2


@pytest.mark.parametrize("name", [".step-00000009.parts", ".step-00000009.writing"])
def test_what_a_killed_run_left_half_written_is_not_a_checkpoint(name: str, checkpoints: Path) -> None:
    shutil.copytree(checkpoints / "step-00000003", checkpoints / name)
    assert newest_name(checkpoints) == ("step-00000003", [])


@pytest.mark.parametrize("folder", ["empty", "missing"])
def test_without_checkpoints_there_is_none_to_resume_from(folder: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert newest_name(tmp_path / folder) == (None, [])


# -- failing ----------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_on_one_rank_stops_both_before_anything_changes(outcome: Outcome) -> None:
    for rank in range(2):
        found = outcome(2, "nan_loss", rank)
        assert found["error"] == "NonFiniteLoss"
        assert "the loss is nan at step 1" in found["message"]
        assert found["changed"] == []


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [1, 2])
def test_a_norms_gradient_that_is_not_finite_stops_every_rank(stage: int, size: int, outcome: Outcome) -> None:
    for rank in range(size):
        assert outcome(size, "nan_norm", rank)[stage] == "NonFiniteGradient"


def test_a_full_disk_is_named_and_the_older_checkpoint_stays_the_newest(outcome: Outcome) -> None:
    found = outcome(1, "full_disk", 0)
    assert (found["error"], found["newest"]) == ("DiskFull", "step-00000001")


def test_the_next_checkpoint_clears_what_a_full_disk_left(outcome: Outcome) -> None:
    assert outcome(1, "full_disk", 0)["names_after"] == ["step-00000001", "step-00000003"]


# -- other numbers of ranks -------------------------------------------------------------------------------------------


def test_state_moves_from_two_ranks_to_one_to_three_and_other_zero_stages_unchanged(
    outcome: Outcome, run_folder: RunFolder
) -> None:
    for size in (2, 1, 3):
        outcome(size, "moved_state", 0)
    folders = [checkpoint_folder(run_folder(size).parent / f"moved-{size}", 2) for size in (2, 1, 3)]
    first, *others = [SliceReader(sorted(folder.glob("rank-*.safetensors"))) for folder in folders]
    assert {name.split(".")[0] for name in first.names} >= {"bits", "evidence", "parameter", "exp_avg", "exp_avg_sq"}
    for other in others:
        assert other.names == first.names
        assert all(torch.equal(first.read_whole(name), other.read_whole(name)) for name in first.names)


@pytest.mark.parametrize("size", [1, 2])
def test_resuming_is_exact_where_no_rank_keeps_a_whole_parameter(size: int, outcome: Outcome) -> None:
    for rank in range(size):
        found = outcome(size, "partitioned", rank)
        assert differing(found["resumed"], found["went_on"]) == []
        assert found["resumed_losses"] == found["losses"][3:]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [1, 2])
def test_resuming_is_exact_in_bfloat16_with_every_zero_stage(stage: int, size: int, outcome: Outcome) -> None:
    for rank in range(size):
        found = outcome(size, "half_precision", rank)[stage]
        assert differing(found["loaded"], found["saved"]) == []
        assert differing(found["resumed"], found["went_on"]) == []
        assert found["resumed_losses"] == found["losses"][3:]


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("size", [1, 2])
def test_in_bfloat16_too_the_first_step_is_the_same_with_every_zero_stage(
    stage: int, size: int, outcome: Outcome
) -> None:
    """Later ones part: gradients are rounded in another order, and flips hang in the balance."""
    runs = outcome(size, "half_precision", 0)
    assert runs[stage]["losses"][:2] == pytest.approx(runs[1]["losses"][:2], rel=2e-3)


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [1, 2])
def test_activation_checkpointing_changes_no_bit_with_any_zero_stage(stage: int, size: int, outcome: Outcome) -> None:
    for rank in range(size):
        (losses, kept), (again, recomputed) = outcome(size, "recompute", rank)[stage]
        assert again == losses
        assert differing(recomputed, kept) == []


@pytest.mark.parametrize("place", ["sharded", "sharded from disk", "offloaded"])
def test_a_teacher_teaches_the_same_wherever_its_weights_are(place: str, outcome: Outcome) -> None:
    losses = outcome(2, "teachers", 0)
    assert losses[place] == losses["resident"]


def test_targets_on_disk_teach_what_the_teacher_does_but_for_half_precision(outcome: Outcome) -> None:
    losses = outcome(2, "teachers", 0)
    assert losses["cached"] == pytest.approx(losses["resident"], abs=2e-3)
    assert losses["cached"] != losses["resident"]
