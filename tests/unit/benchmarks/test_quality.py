"""The quality bench: its rules, its store and its figures, without any model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quality import store, suites
from benchmarks.quality.ablation import ShareRule
from benchmarks.quality.tables import Results, _claims
from benchmarks.quality.tasks import check_disjoint
from benchmarks.quality.training import RunConfig, _Average
from kbop_core.kbop import KBOP
from kbop_core.layers import BinaryLinear
from kbop_core.schedules import FlipSchedule

STEPS = 30


def test_the_laboratorys_rule_with_its_defaults_flips_nearly_what_the_product_flips() -> None:
    """Not bit for bit: the product measures second moments by projections and keeps evidence in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    layer = BinaryLinear(128, 96, False, 64, trainable=True)
    layer.set_signs(torch.randn(96, 128, generator=generator))
    schedule = FlipSchedule(0.01, STEPS, 2)
    product, rule, signs = KBOP({"a": layer}, schedule), ShareRule(schedule), layer.signs()
    pull, start = torch.randn(96, 128, generator=generator), layer.signs()
    for step in range(STEPS):
        gradient = pull + torch.randn(96, 128, generator=generator)
        mask = rule.flips(signs, gradient, step)
        signs = torch.where(mask, -signs, signs)
        assert layer.gradient_sink is not None
        layer.gradient_sink(gradient.clone())
        product.step()
    ours, theirs = layer.signs() != start, signs != start
    assert min(int(ours.sum()), int(theirs.sum())) > 1000
    assert int((ours & theirs).sum()) > 0.65 * int((ours | theirs).sum())


def test_layers_that_take_turns_make_as_many_flips_in_fewer_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.rand(32, 64, generator=generator) + 0.1 for _ in range(20)]
    made = {}
    for every in (1, 4):
        rule = ShareRule(FlipSchedule(0.02, 20, 1), every=every, phase=every - 1)
        made[every] = [int(rule.flips(torch.ones(32, 64), g, t).sum()) for t, g in enumerate(gradients)]
    assert sum(made[1]) == sum(made[4]) > 200
    assert [t for t, flips in enumerate(made[4]) if flips] == [3, 7, 11, 15, 19]


@pytest.mark.parametrize("knobs", [{}, {"normalisation": "element"}, {"shape": "linear"}])
def test_every_knob_leaves_a_zero_gradient_without_flips(knobs: dict[str, Any]) -> None:
    rule = ShareRule(FlipSchedule(0.5, 4, 1), **knobs)
    assert not any(bool(rule.flips(torch.ones(3, 64), torch.zeros(3, 64), t).any()) for t in range(4))


def test_significance_keeps_noise_from_flipping() -> None:
    generator, flips = torch.Generator().manual_seed(0), []
    for significance in (0.0, 6.0):
        rule = ShareRule(FlipSchedule(0.05, 20, 1), significance=significance)
        noise = [torch.randn(32, 64, generator=generator) for _ in range(20)]
        flips.append(sum(int(rule.flips(torch.ones(32, 64), g, t).sum()) for t, g in enumerate(noise)))
    assert flips[0] > 100 and flips[1] == 0


def test_held_out_text_inside_the_training_text_is_refused() -> None:
    text = "".join(f"sentence number {i} of this document. " for i in range(40))
    check_disjoint(["something else entirely, at length. " * 10], [text])
    with pytest.raises(ValueError, match="held-out text occurs in the training text"):
        check_disjoint(["before " + text + " after"], [text])


def test_a_stored_run_is_found_again_and_a_torn_line_is_not(tmp_path: Path) -> None:
    path, config = tmp_path / "runs.jsonl", RunConfig("demo", "ste", 1000, lr=0.01)
    store.save(config, {"test": 5.0}, "abc", path)
    path.write_text(path.read_text() + '{"key": "half', encoding="utf-8")
    assert store.finished(path) == {store.key(config): {"test": 5.0}}
    assert store.key(config) != store.key(RunConfig("demo", "ste", 1000, lr=0.02))
    assert "rule" in json.loads(store.key(RunConfig("demo", "kbop"))) and "rule" not in json.loads(store.key(config))


def fake(task: str, found: dict[tuple[str, float], float]) -> Results:
    """Runs at the short budget whose validation and test perplexities are equal."""
    done = {store.key(RunConfig(task, "plain")): {"test": 100.0, "teacher": 4.0, "validation": 100.0}}
    for (method, rate), value in found.items():
        config = RunConfig(task, method, suites.SHORT, lr=rate)
        bits = 2.2 if method == "binarymos" else 1.2
        done[store.key(config)] = {"validation": value, "test": value, "bits": bits}
    return Results(done)


def test_the_gap_is_closed_against_the_best_rate_of_the_best_peer() -> None:
    ours = suites.SWEEPS["kbop"][0]
    results = fake("demo", {("kbop", ours): 8.0, ("ste", 2e-3): 16.0, ("ste", 5e-3): 12.0, ("onebit", 5e-3): 14.0})
    assert results.best_peer("demo", suites.SHORT) == "ste"
    expected = (math.log(12) - math.log(8)) / (math.log(12) - math.log(4))
    assert results.gap_closed("demo", "ste", suites.SHORT) == pytest.approx(expected)


@pytest.mark.parametrize("best", [1e-4, 5e-4, 2e-3, 5e-2])
def test_a_sweep_goes_outwards_until_its_best_lies_between_two_that_are_worse(best: float) -> None:
    done: dict[str, dict[str, Any]] = {}
    for _ in range(10):
        missing = [c for c in suites.bracket(["demo"], ["ste"], done) if store.key(c) not in done]
        if not missing:
            break
        done |= {store.key(c): {"validation": abs(math.log(c.lr / best))} for c in missing}
    rates, ran = suites.LATENT_RATES, {json.loads(k)["lr"] for k in done}
    place = rates.index(best)
    assert suites.best("demo", "ste", done) == RunConfig("demo", "ste", suites.SHORT, lr=best)
    assert ran == {
        *rates[max(0, place - 1) : place + 2],
        *(r for r in rates if min(best, 1e-3) <= r <= max(best, 5e-3)),
    }


def test_a_method_of_one_rate_is_run_once() -> None:
    assert [c.lr for c in suites.bracket(["demo"], ["kbop"], {})] == list(suites.SWEEPS["kbop"])


def test_each_effort_level_of_the_job_spec_is_a_run() -> None:
    found = {effort: (c.method, c.tokens, c.options) for effort, c in suites.efforts(["demo"])}
    assert found == {
        "quick": ("quick", 0, {}),
        "standard": ("kbop", suites.SHORT, {}),
        "max": ("kbop", suites.MEDIUM, {"blockwise_steps": 1600}),
    }


def test_a_peer_of_more_bits_is_no_peer_for_the_gap() -> None:
    ours = suites.SWEEPS["kbop"][0]
    results = fake("demo", {("kbop", ours): 8.0, ("ste", 2e-3): 16.0, ("binarymos", 2e-3): 9.0})
    assert results.fair_peers("demo", suites.SHORT) == ["ste"]
    assert results.best_peer("demo", suites.SHORT) == "ste"


def claims(results: Results) -> dict[str, float]:
    """The short budget's: first words of the name → value."""
    return {c.name.partition(", short")[0]: c.value for c in _claims(results)}


def test_the_gap_of_all_models_together_does_not_divide_by_what_one_leaves_open() -> None:
    ours = suites.SWEEPS["kbop"][0]
    wide = fake("demo", {("kbop", ours): 8.0, ("ste", 2e-3): 16.0})
    narrow = fake("stories260K", {("kbop", ours): 4.4, ("ste", 2e-3): 4.04})
    found = claims(Results(wide.done | narrow.done))
    assert found["gap closed, mean"] == pytest.approx((0.5 + math.log(4.04 / 4.4) / math.log(4.04 / 4)) / 2, abs=1e-3)
    expected = (math.log(2) + math.log(4.04 / 4.4)) / (math.log(4) + math.log(4.04 / 4))
    assert found["gap closed, all models together"] == pytest.approx(expected, abs=1e-3)
    assert found["ahead of the best peer, worst model"] == pytest.approx(math.log(4.04 / 4.4), abs=1e-3)


def test_a_model_whose_peer_passes_the_teacher_is_named_and_still_the_worst() -> None:
    ours = suites.SWEEPS["kbop"][0]
    plain = fake("demo", {("kbop", ours): 8.0, ("ste", 2e-3): 16.0})
    passed = fake("stories260K", {("kbop", ours): 4.1, ("ste", 2e-3): 3.9})
    both = Results(plain.done | passed.done)
    found = claims(both)
    assert found["gap closed, mean"] == pytest.approx(0.5)
    assert found["ahead of the best peer, worst model"] == pytest.approx(math.log(3.9 / 4.1), abs=1e-3)
    assert "2 of 4 models" in next(_claims(both)).name and "stories260K has no gap" in next(_claims(both)).name


def test_without_a_run_there_is_no_figure() -> None:
    results = fake("demo", {("ste", 2e-3): 16.0})
    assert results.gap_closed("demo", "ste", suites.SHORT) is None
    assert results.perplexity("demo", "kbop", suites.SHORT) is None


def test_the_gap_is_taken_over_the_seeds_that_both_ran() -> None:
    ours = suites.SWEEPS["kbop"][0]
    results = fake("demo", {("kbop", ours): 8.0, ("ste", 2e-3): 16.0})
    before = results.gap_closed("demo", "ste", suites.SHORT)
    second = RunConfig("demo", "kbop", suites.SHORT, seed=1, lr=ours)
    results.done[store.key(second)] = {"validation": 5.0, "test": 5.0, "bits": 1.2}
    assert results.gap_closed("demo", "ste", suites.SHORT) == before and before is not None
    theirs = RunConfig("demo", "ste", suites.SHORT, seed=1, lr=2e-3)
    results.done[store.key(theirs)] = {"validation": 16.0, "test": 16.0, "bits": 1.2}
    assert results.common_seeds("demo", "ste", suites.SHORT) == [0, 1]
    assert (results.gap_closed("demo", "ste", suites.SHORT) or 0.0) > before


@pytest.mark.parametrize("late", [1, 2, 4])
def test_larger_late_batches_read_the_same_windows_once_in_fewer_steps(late: int) -> None:
    config = RunConfig("demo", "kbop", 64 * 1024, options={"late_batch": late})
    read = [number for step in range(config.steps) for number in config.batches(step)]
    assert read == list(range(64)) and config.steps == 32 + 32 // late


def test_averaging_takes_the_mean_of_the_last_steps_and_without_it_nothing_changes() -> None:
    moving, still = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.full((2,), 7.0))
    averages = [_Average([moving], 10, 0.4), _Average([still], 10, 0.0)]
    for step in range(10):
        moving.data.fill_(float(step))
        for average in averages:
            average.see(step)
    for average in averages:
        average.take()
    assert moving.tolist() == [7.5, 7.5] and still.tolist() == [7.0, 7.0]
