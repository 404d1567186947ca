"""A teacher's targets on disk: what ranks write one after the other is what training reads window by window."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kbop_core import checkpoint, target_cache
from kbop_core.distill import distillation_loss, top_k_loss, top_targets
from kbop_core.errors import DiskFull
from kbop_core.shard import Gang
from kbop_core.target_cache import TargetCache

CPU = torch.device("cpu")
VOCABULARY, CONTEXT = 80, 5
pytestmark = pytest.mark.usefixtures("no_leftovers")


class Teacher:
    """Logits that depend on the token alone; remembers which windows it was asked for."""

    def __init__(self, vocabulary: int = VOCABULARY) -> None:
        table = torch.randn(VOCABULARY, vocabulary, generator=torch.Generator().manual_seed(0))
        self.logits, self.asked = 2.0 * table, list[int]()

    def rows(self, numbers: Sequence[int]) -> Tensor:
        """Windows of equal tokens: the window's own number."""
        self.asked += numbers
        return torch.tensor(list(numbers))[:, None].expand(-1, CONTEXT)

    def log_probs(self, ids_BT: Tensor) -> Tensor:
        return self.logits[ids_BT].log_softmax(-1)

    def write(self, cache: TargetCache, ranks: int = 1) -> None:
        for rank in range(ranks):
            cache.write(Gang(rank, ranks), self.rows, self.log_probs, batch=3)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_cache, "PART", 4)


def log_probs_of(teacher: Teacher, cache: TargetCache, number: int) -> bool:
    """Whether the cache has this window's targets, to half precision."""
    found, expected = cache.read([number], CPU), top_targets(teacher.log_probs(torch.full((1, CONTEXT), number)), 64)
    near = torch.allclose(found.log_p_BTK, expected.log_p_BTK, atol=2**-8)
    return near and torch.equal(found.ids_BTK, expected.ids_BTK)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_the_parts_of_all_ranks_together_hold_every_window_once(ranks: int, tmp_path: Path) -> None:
    teacher, cache = Teacher(), TargetCache(tmp_path, range(14))
    teacher.write(cache, ranks)
    assert sorted(teacher.asked) == list(range(14))
    assert len(list(tmp_path.iterdir())) == cache.parts == 4
    assert all(log_probs_of(teacher, cache, number) for number in range(14))


def test_windows_come_in_the_order_asked_whatever_the_order_and_repeats_of_the_run(tmp_path: Path) -> None:
    teacher, cache = Teacher(), TargetCache(tmp_path, [70, 3, 9, 3, 70, 41])
    teacher.write(cache)
    assert teacher.asked == [3, 9, 41, 70]
    several = cache.read([41, 3, 41], CPU)
    for place, number in enumerate([41, 3, 41]):
        one = cache.read([number], CPU)
        assert torch.equal(several.ids_BTK[place], one.ids_BTK[0])
        assert torch.equal(several.log_rest_BT[place], one.log_rest_BT[0])
        assert log_probs_of(teacher, cache, number)


def test_a_run_that_goes_on_writes_only_the_parts_that_are_missing(tmp_path: Path) -> None:
    teacher, cache, told = Teacher(), TargetCache(tmp_path, range(14)), []
    teacher.write(cache)
    (tmp_path / "targets-00001.safetensors").unlink()
    teacher.asked.clear()
    cache.write(Gang(), teacher.rows, teacher.log_probs, 3, lambda done, total: told.append((done, total)))
    assert teacher.asked == [4, 5, 6, 7]
    assert told == [(4, 14), (7, 14), (8, 14), (12, 14), (14, 14)]  # within the part that it makes, too


def test_a_part_that_cannot_be_read_is_written_anew(tmp_path: Path) -> None:
    teacher, cache = Teacher(), TargetCache(tmp_path, range(14))
    teacher.write(cache)
    (tmp_path / "targets-00001.safetensors").write_bytes(b"half")
    teacher.asked.clear()
    teacher.write(cache)
    assert teacher.asked == [4, 5, 6, 7]
    assert log_probs_of(teacher, cache, 5)


def test_parts_of_other_windows_are_written_anew(tmp_path: Path) -> None:
    teacher = Teacher()
    teacher.write(TargetCache(tmp_path, range(10)))
    cache = TargetCache(tmp_path, [0, 1, 2, 3, 20, 21, 22])
    teacher.asked.clear()
    teacher.write(cache)
    assert teacher.asked == [20, 21, 22]
    assert all(log_probs_of(teacher, cache, number) for number in (0, 20, 22))


def test_a_token_takes_258_bytes(tmp_path: Path) -> None:
    Teacher().write(TargetCache(tmp_path, range(4)))
    tensors = load_file(tmp_path / "targets-00000.safetensors")
    assert sum(t.nbytes for t in tensors.values()) == 258 * 4 * CONTEXT


@pytest.mark.parametrize(("vocabulary", "dtype"), [(65_536, torch.uint16), (65_537, torch.int32)])
def test_ids_are_two_bytes_as_long_as_the_vocabulary_allows(
    vocabulary: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    teacher, cache = Teacher(vocabulary), TargetCache(tmp_path, [7])
    teacher.logits[:, vocabulary - 1] += 50.0  # the last token is the likeliest
    teacher.write(cache)
    assert load_file(tmp_path / "targets-00000.safetensors")["ids"].dtype == dtype
    assert cache.read([7], CPU).ids_BTK[..., 0].tolist() == [[vocabulary - 1] * CONTEXT]


def test_of_a_small_vocabulary_the_whole_distribution_is_kept(tmp_path: Path) -> None:
    teacher, cache = Teacher(20), TargetCache(tmp_path, [3, 5])
    teacher.write(cache)
    student = torch.randn(2, CONTEXT, 20)
    whole = distillation_loss(student, teacher.logits[teacher.rows([3, 5])])
    assert float(top_k_loss(student, cache.read([3, 5], CPU))) == pytest.approx(float(whole), rel=2e-3)


def test_a_full_disk_keeps_complete_parts_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, teacher, cache = checkpoint.save_file, Teacher(), TargetCache(tmp_path, range(14))

    def save_file(tensors: Any, path: Path, metadata: Any) -> None:
        if "targets-00002" in path.name:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(DiskFull, match="no space left while writing targets-00002"):
        teacher.write(cache)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"targets-0000{part}.safetensors" for part in (0, 1)]


def test_no_more_files_are_open_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_cache, "PART", 1)
    monkeypatch.setattr(target_cache, "OPEN", 2)
    teacher, cache, held = Teacher(), TargetCache(tmp_path, range(6)), set[int]()
    teacher.write(cache)
    for number in (0, 1, 2, 0, 5, 5, 3):
        assert log_probs_of(teacher, cache, number)
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "targets-" in line}
        held.add(len(mapped))
    assert held == {1, 2}
