"""Larger teachers and the tasks built from them, with a tiny recipe and a tiny text, on the CPU."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.quality import runner, tasks, teachers
from benchmarks.quality.methods import METHODS
from benchmarks.quality.teachers import TEACHERS, LargerRecipe, teacher_folder
from benchmarks.quality.training import RunConfig, run
from kbop_core.perplexity import Quality

TINY = LargerRecipe(
    name="tiny",
    hidden=32,
    heads=2,
    layers=2,
    vocab=300,
    context=32,
    batch_windows=8,
    steps=12,
    warmup_steps=2,
    evaluate_every=4,
)
WORDS = [f"{a}{b}" for a in ("mor", "lin", "tas", "ber") for b in ("a", "en", "ot", "uki")]
LARGE = {recipe.name for recipe in TEACHERS}
CPU = torch.device("cpu")


def prose(seed: int, documents: int) -> list[str]:
    chooser = random.Random(seed)
    return [" ".join(chooser.choices(WORDS, k=300)) for _ in range(documents)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task "tiny", and a cache of its own for it."""
    split = (prose(0, 12), prose(1, 2), prose(2, 2))
    monkeypatch.setitem(tasks.SOURCES, "tiny", tasks.Source("", lambda _: split, "words", TINY))
    monkeypatch.setattr(tasks, "CACHE", tmp_path)
    monkeypatch.setattr(tasks, "CALIBRATION_TOKENS", 2048)
    return tmp_path


def test_a_task_with_a_larger_teacher_trains_students_and_keeps_no_log_probabilities(cache: Path) -> None:
    task = tasks.Task("tiny")
    log_p = task.log_probs([0, 1])
    assert log_p.shape == (2, tasks.CONTEXT, 300)
    assert torch.allclose(log_p.exp().sum(-1), torch.ones(2, tasks.CONTEXT), atol=1e-4)
    for method, rate in (("kbop", 0.01), ("ste", 1e-3)):
        config = RunConfig("tiny", method, 2048, batch_tokens=512, lr=rate, options={"init": "bnn"})
        found = run(task, config, METHODS[method](task, config))
        assert math.isfinite(found["test"]) and found["kl"] > 0
    assert not list(cache.rglob("*.npy"))


def test_a_larger_teacher_is_trained_once_better_than_chance(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tasks.Task("tiny")
    config = RunConfig("tiny", "plain")
    assert run(first, config, METHODS["plain"](first, config))["teacher"] < 300
    monkeypatch.setattr(teachers, "_train", lambda *_: pytest.fail("trained again"))
    again = tasks.Task("tiny")
    assert again.model == first.model == str(cache / "teachers" / "tiny")
    assert again._ids == first._ids


def test_training_ends_when_validation_stops_improving_and_the_best_weights_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([3.0, 2.0, 2.5, 2.5, 1.0])
    kept: list[torch.Tensor] = []

    def look(model: LlamaForCausalLM, *_: object) -> Quality:
        kept.append(model.model.norm.weight.detach().clone())
        nll = next(looks)
        return Quality(math.exp(nll), nll, 1)

    monkeypatch.setattr(teachers, "evaluate", look)
    recipe = replace(TINY, steps=20, patience=2)
    folder = teacher_folder(recipe, prose(0, 12), prose(1, 2), tmp_path, CPU)
    assert len(kept) == 4
    stored = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.allclose(stored.model.norm.weight, kept[1], atol=1e-3)
    assert not torch.equal(kept[1], kept[2])


def test_a_folder_of_another_recipe_or_text_is_refused(tmp_path: Path) -> None:
    train, validation = prose(0, 12), prose(1, 2)
    teacher_folder(TINY, train, validation, tmp_path, CPU)
    with pytest.raises(ValueError, match="another recipe or from other text"):
        teacher_folder(replace(TINY, seed=1), train, validation, tmp_path, CPU)
    with pytest.raises(ValueError, match="another recipe or from other text"):
        teacher_folder(TINY, train[1:], validation, tmp_path, CPU)


def test_a_teacher_whose_training_fails_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="diverged"):
        teacher_folder(replace(TINY, peak_lr=1e30), prose(0, 12), prose(1, 2), tmp_path, CPU)
    assert not list(tmp_path.iterdir())


def test_training_a_teacher_leaves_the_global_generator_where_it_was(tmp_path: Path) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    teacher_folder(TINY, prose(0, 12), prose(1, 2), tmp_path, CPU)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("recipe", TEACHERS, ids=lambda recipe: recipe.name)
def test_larger_teachers_have_the_size_they_are_called_by(recipe: LargerRecipe) -> None:
    millions = int(recipe.name.removeprefix("wikitext-").removesuffix("m"))
    with torch.device("meta"):
        model = LlamaForCausalLM(recipe.config(recipe.vocab, 0, 1))
    assert model.num_parameters() == pytest.approx(millions * 1e6, rel=0.1)
    blocks = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    assert all(m.in_features % 128 == m.out_features % 128 == 0 for m in blocks)


@pytest.mark.parametrize("gpu", [False, True])
def test_large_tasks_are_listed_only_with_a_gpu(gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(tasks, "shared_data", lambda: tmp_path)
    assert not LARGE & set(tasks.available_tasks())  # no text
    (tmp_path / tasks.WIKITEXT).mkdir(parents=True)
    assert set(tasks.available_tasks()) == set(tasks.SOURCES) - (set() if gpu else LARGE)


def test_wikitext_is_read_by_articles_and_only_the_teacher_reads_novels(tmp_path: Path) -> None:
    folder = tmp_path / tasks.WIKITEXT
    folder.mkdir(parents=True)
    (tmp_path / "text" / "gutenberg").mkdir()
    (tmp_path / "text" / "gutenberg" / "novel.txt").write_text("It was.", encoding="utf-8")
    article = " = One = \n \n Text . \n = = Part = = \n \n More . \n \n"
    for part in ("train", "valid", "test"):
        (folder / f"{part}.txt").write_text(" \n" + article + article.replace("One", part), encoding="utf-8")
    source = tasks.SOURCES["wikitext-10m"]
    train, validation, test = source.split(tmp_path)
    assert [len(train), len(validation), len(test)] == [2, 2, 2]
    assert train[1].startswith(" = train = ") and test[0] == article
    assert source.more(tmp_path) == ["It was."]


def test_runs_of_large_tasks_come_last_and_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pools: list[tuple[list[str], int]] = []
    monkeypatch.setattr(runner, "_run_in_pool", lambda todo, workers: pools.append(([c.task for c in todo], workers)))
    monkeypatch.setattr(runner.store, "finished", dict)
    runner.run_all([RunConfig("wikitext-10m", "plain"), RunConfig("demo", "plain")], 3)
    assert pools == [(["demo"], 3), (["wikitext-10m"], 1)]
