"""The super-resolution benchmark on synthetic images: every method trains, runs resume, scores and claims add up."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.super_resolution.images import (
    Images,
    Patches,
    bicubic,
    luma,
    make_example,
    psnr,
    read_images,
)
from benchmarks.super_resolution.methods import DEFAULT, LABELS, METHODS
from benchmarks.super_resolution.network import SuperResolution, binarize_plainly, body_weights
from benchmarks.super_resolution.runs import Chosen, Plan, Store, choose, key, run_all
from benchmarks.super_resolution.table import claims, gap_closed, rows
from benchmarks.super_resolution.training import (
    Recipe,
    RunConfig,
    RunResult,
    Trainer,
    bicubic_scores,
    run,
    stored_bits,
)

TINY = Recipe(steps=2, batch=2, patch=6, channels=3, blocks=1)
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def picture(height: int, width: int, seed: int) -> Tensor:
    """Smooth noise as luma, (1, H, W)."""
    coarse = torch.rand(1, 1, 5, 5, generator=torch.Generator().manual_seed(seed))
    return (bicubic(coarse, height, width)[0] * 0.8 + 0.1).clamp(0.1, 0.9)


@pytest.fixture
def images() -> Images:
    made = [make_example(picture(30 + n, 27 + n, n), 2) for n in range(4)]
    return Images(2, made[:2], made[2:3], {"Set5": made[2:], "Set14": made[3:]})


class Watched:
    """Counts what a store tells."""

    def __init__(self) -> None:
        self.begun: list[RunConfig] = []
        self.steps = self.ends = 0

    def begins(self, config: RunConfig) -> None:
        self.begun.append(config)

    def stepped(self, step: int, loss: float) -> None:
        self.steps += 1

    def ended(self) -> None:
        self.ends += 1


# -- images ----------------------------------------------------------------------------------------------------------


def test_equal_images_have_infinite_psnr() -> None:
    assert psnr(picture(9, 9, 0), picture(9, 9, 0), 2) == math.inf


@pytest.mark.parametrize(("error", "decibels"), [(1.0, 0.0), (0.1, 20.0), (1 / 255, 48.1308)])
def test_psnr_of_a_known_mean_squared_error(error: float, decibels: float) -> None:
    truth = torch.zeros(1, 12, 10, dtype=torch.float64)
    assert psnr(truth + error, truth, 2) == pytest.approx(decibels, abs=1e-4)


def test_the_border_does_not_count_and_the_first_pixel_inside_does() -> None:
    truth, wrong = torch.zeros(1, 8, 8), torch.zeros(1, 8, 8)
    wrong[:, :2], wrong[:, -2:], wrong[:, :, :2], wrong[:, :, -2:] = 1, 1, 1, 1
    assert psnr(wrong, truth, 2) == math.inf
    wrong[0, 2, 2] = 1.0
    assert psnr(wrong, truth, 2) == pytest.approx(10 * math.log10(16))


@pytest.mark.parametrize(
    ("colour", "byte"), [((0, 0, 0), 16.0), ((255, 255, 255), 235.0), ((255, 0, 0), 81.481), ((0, 0, 255), 40.966)]
)
def test_luma_is_bt601_studio_range(colour: tuple[int, int, int], byte: float) -> None:
    found = luma(Image.new("RGB", (3, 2), colour))
    assert found.shape == (1, 2, 3)
    torch.testing.assert_close(found * 255, torch.full((1, 2, 3), byte), atol=1e-3, rtol=0)


def test_a_greyscale_file_counts_as_equal_red_green_and_blue() -> None:
    grey = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20)
    assert grey.mode == "L"
    assert torch.equal(luma(grey), luma(grey.convert("RGB")))


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_images_are_cut_to_a_multiple_of_the_scale(scale: int) -> None:
    image = picture(31, 29, 0)
    example = make_example(image, scale)
    height, width = 31 // scale, 29 // scale
    assert example.low.shape == (1, height, width)
    assert torch.equal(example.high, image[:, : height * scale, : width * scale])


@pytest.mark.parametrize("scale", [2, 4])
def test_reduction_is_pils_antialiased_bicubic(scale: int) -> None:
    image = picture(32, 24, 1)
    theirs = Image.fromarray(image[0].numpy(), mode="F").resize((24 // scale, 32 // scale), Image.Resampling.BICUBIC)
    torch.testing.assert_close(make_example(image, scale).low[0], torch.from_numpy(np.array(theirs)), atol=1e-5, rtol=0)


def test_patches_are_the_same_for_the_same_seed_and_others_for_another(images: Images) -> None:
    draws = [Patches(images, 6, 4, seed).draw() for seed in (0, 0, 1)]
    assert torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][1], draws[2][1])


def test_both_halves_of_a_patch_show_the_same_place_the_same_way_up(images: Images) -> None:
    low, high = Patches(images, 6, 16, 0).draw()
    assert (low.shape, high.shape) == ((16, 1, 6, 6), (16, 1, 12, 12))
    inner = (slice(None), slice(None), slice(2, 4), slice(2, 4))  # a patch's own border lacks its neighbours
    torch.testing.assert_close(bicubic(high, 6, 6)[inner], low[inner], atol=1e-5, rtol=0)


def test_a_patch_that_no_image_holds_is_refused(images: Images) -> None:
    with pytest.raises(ValueError, match="patch is 40"):
        Patches(images, 40, 1, 0)


def test_folders_are_read_and_every_ninth_training_image_is_held_out(tmp_path: Path) -> None:
    for folder, count in (("T91", 10), ("Set5", 1), ("Set14", 1)):
        (tmp_path / folder).mkdir()
        for n in range(count):
            Image.new("RGB" if n else "L", (9, 8)).save(tmp_path / folder / f"t{n}.png")
    found = read_images(tmp_path, 4)
    assert (len(found.training), len(found.held_out), sorted(found.tests)) == (8, 2, ["Set14", "Set5"])
    assert found.tests["Set5"][0].high.shape == (1, 8, 8)


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="T91"):
        read_images(tmp_path, 2)


# -- network and training --------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("scale", [2, 4])
def test_every_row_starts_as_the_bicubic_enlargement(method: str, scale: int) -> None:
    low = picture(7, 5, 0)[None]
    network = SuperResolution(scale, 3, 1, METHODS[method].body, 0)
    assert torch.equal(network(low), bicubic(low, 7 * scale, 5 * scale))


@every_method
def test_every_method_trains_two_steps_and_scores(method: str, images: Images) -> None:
    told: list[tuple[int, float]] = []
    result = run(RunConfig(method, 2, METHODS[method].rates[0], 0, TINY), images, lambda *step: told.append(step))
    assert [number for number, _ in told] == [0, 1]
    assert set(result.scores) == ({"full", "plain"} if method == "full" else {method})
    for scores in result.scores.values():
        assert set(scores) == {"Set5", "Set14", "held out"}
        assert all(math.isfinite(value) for value in scores.values())
    assert result.bits.keys() == result.scores.keys()


@every_method
def test_a_run_repeats_itself(method: str, images: Images) -> None:
    config = RunConfig(method, 2, METHODS[method].rates[0], 3, TINY)
    assert run(config, images) == run(config, images)


def test_every_method_sees_the_same_batches_head_and_tail(images: Images) -> None:
    trainers = [Trainer(RunConfig(m, 2, METHODS[m].rates[0], 5, TINY), images) for m in METHODS]
    drawn = [trainer.patches.draw()[0] for trainer in trainers]
    assert all(torch.equal(drawn[0], other) for other in drawn)
    heads = [trainer.network.head.weight for trainer in trainers]
    assert all(torch.equal(heads[0], other) for other in heads)


@every_method
def test_every_parameter_is_trained_by_exactly_one_group(method: str, images: Images) -> None:
    trainer = Trainer(RunConfig(method, 2, 1e-3, 0, TINY), images)
    trained = [id(p) for group in trainer.adamw.param_groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in trainer.network.parameters())


def test_kbop_flips_signs_in_a_run(images: Images) -> None:
    trainer = Trainer(RunConfig("kbop", 2, 0.05, 0, replace(TINY, steps=6)), images)
    before = [la.signs() for la in trainer.network.modules() if hasattr(la, "signs_count")]
    for number in range(6):
        trainer.step(number)
    after = [la.signs() for la in trainer.network.modules() if hasattr(la, "signs_count")]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(("method", "least", "most"), [("full", 12, 12), ("ste", 12, 12), ("kbop", 2.4, 2.6)])
def test_state_is_counted_from_the_tensors_that_are_held(
    method: str, least: float, most: float, images: Images
) -> None:
    recipe = replace(TINY, channels=16, steps=1)
    assert least <= run(RunConfig(method, 2, 1e-3, 0, recipe), images).state_bytes <= most


@pytest.mark.parametrize(("method", "bits"), [("full", 32.0), ("kbop", 1 + 16 / 144), ("react", 1 + 16 * 3 / 144)])
def test_bits_count_all_that_is_stored_for_binary_weights(method: str, bits: float) -> None:
    assert stored_bits(METHODS[method].body, 16) == pytest.approx(bits)


def test_plain_binarization_leaves_one_magnitude_per_channel_and_the_signs() -> None:
    network = SuperResolution(2, 4, 1, METHODS["full"].body, 0)
    before = [w.detach().clone() for w in body_weights(network)]
    binarize_plainly(network)
    for old, new in zip(before, body_weights(network), strict=True):
        mean = old.abs().mean((1, 2, 3), keepdim=True)
        assert torch.equal(new, torch.where(old >= 0, mean, -mean))


def test_a_loss_that_is_not_finite_stops_the_run(images: Images) -> None:
    trainer = Trainer(RunConfig("full", 2, 1e-3, 0, TINY), images)
    nn.init.constant_(trainer.network.tail.weight, math.nan)
    with pytest.raises(RuntimeError, match="the loss is nan at step 0"):
        trainer.step(0)


# -- all runs, rows and claims ---------------------------------------------------------------------------------------


def test_a_second_time_every_run_comes_from_its_file(images: Images, tmp_path: Path) -> None:
    plan, first, again = Plan(("full", "kbop"), (2,), (0, 1), TINY), Watched(), Watched()
    one, other = (list(run_all(plan, [images], Store(tmp_path, watched))) for watched in (first, again))
    assert one == other
    assert first.ends == again.ends == plan.runs() == len(list(tmp_path.glob("*.json"))) == (3 + 1) + (5 + 1)
    assert (first.steps, again.steps) == (2 * plan.runs(), 0)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"rate": 2e-3}, {"method": "ste"}, {"scale": 4}, {"recipe": replace(TINY, batch=3)}]
)
def test_a_run_with_any_other_setting_has_another_key(change: dict[str, Any]) -> None:
    config = RunConfig("full", 2, 1e-3, 0, TINY)
    assert key(config) != key(replace(config, **change))
    assert key(config) == key(replace(config))


class Made(Store):
    """Results without training: a rate that wins on held-out images and loses on the test sets."""

    def result(self, config: RunConfig, images: Images) -> RunResult:
        held = {1e-3: 30.0, 2e-3: 31.0}.get(config.rate, 29.0)
        self.watcher.begins(config)
        return made_result(config.method, 60.0 - held, held)


def made_result(method: str, tests: float, held: float = 0.0) -> RunResult:
    scores = {method: {"Set5": tests + 1, "Set14": tests - 1, "held out": held}}
    return RunResult(scores, 0.0, 12.0, {method: 1.0})


def test_rates_are_chosen_on_held_out_images_by_the_first_seed_only(images: Images, tmp_path: Path) -> None:
    watched = Watched()
    found = choose("kbop", Plan(("kbop",), (2,), (7, 8, 9), TINY), images, Made(tmp_path, watched))
    assert found.rate == 2e-3
    seen = [(config.rate, config.seed) for config in watched.begun]
    assert seen == [(r, 7) for r in METHODS["kbop"].rates] + [(2e-3, 8), (2e-3, 9)]


def chosen(scale: int, **psnr: float) -> list[Chosen]:
    return [Chosen(m, scale, 1e-3, tuple(made_result(m, v + d) for d in (-0.1, 0.1))) for m, v in psnr.items()]


def test_rows_have_mean_and_deviation_over_seeds_for_each_set(images: Images) -> None:
    found = rows(chosen(2, kbop=30.0), {2: bicubic_scores(images)})
    assert [row["method"] for row in found] == ["bicubic", "bicubic", LABELS["kbop"], LABELS["kbop"]]
    ours = found[2]
    assert (ours["set"], ours["psnr"], ours["std"], ours["seeds"]) == ("Set5", 31.0, 0.141, 2)
    assert len({tuple(row) for row in found}) == 1


@pytest.mark.parametrize(("ours", "share", "holds"), [(30.5, 0.5, True), (30.2, 0.2, False), (29.0, -1.0, False)])
def test_the_claim_is_the_share_of_the_gap_between_the_best_peer_and_full_precision(
    ours: float, share: float, holds: bool
) -> None:
    (found,) = claims(chosen(2, full=31.0, ste=30.0, react=29.0, kbop=ours, kbop_unit=30.9))
    assert found.value == pytest.approx(share)
    assert (found.bar, found.holds) == (">= 0.3683", holds)
    assert LABELS["ste"] in found.name


def test_there_is_one_claim_per_scale_and_none_without_its_methods() -> None:
    both = chosen(2, full=31.0, ste=30.0, kbop=30.5) + chosen(4, full=27.0, ste=26.0)
    assert len(claims(both)) == 1
    assert len(claims(both + chosen(4, kbop=26.1))) == 2


def test_without_a_gap_there_is_no_share_of_it() -> None:
    with pytest.raises(ValueError, match="no gap"):
        gap_closed(30.0, 31.0, 31.0)
    (found,) = claims(chosen(2, full=31.0, ste=31.0, kbop=32.0))
    assert (found.value, found.holds) == (0.0, False)
    assert "no gap" in found.name


def test_the_default_methods_exist() -> None:
    assert set(DEFAULT) < set(METHODS)
