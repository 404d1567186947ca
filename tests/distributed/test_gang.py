"""Collectives, flips and measurements over one, two and three real ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

Outcome = Callable[[int, str, int], Any]
STEPS = 5


def ranks(size: int) -> range:
    return range(size)


def same_bits(one: dict[str, Any], other: dict[str, Any]) -> bool:
    steps = zip(one["bits"], other["bits"], strict=True)
    return all(torch.equal(a[name], b[name]) for a, b in steps for name in a)


# -- collectives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3])
def test_rows_summed_to_their_owners_and_gathered_again_are_the_whole_sum(size: int, outcome: Outcome) -> None:
    for rank in ranks(size):
        found = outcome(size, "collectives", rank)
        factor = sum(r + 1 for r in ranks(size))
        for whole, gathered, as_bytes in zip(found["wholes"], found["gathered"], found["bytes"], strict=True):
            assert torch.equal(gathered, whole * factor)
            assert torch.equal(as_bytes, (whole * factor).byte())


@pytest.mark.parametrize(("size", "total"), [(1, 1 + 2.0**-10), (2, 3.0), (3, 7.0)])
def test_gradients_are_rounded_once_on_the_wire_and_not_at_all_without_one(
    size: int, total: float, outcome: Outcome
) -> None:
    rough = outcome(size, "collectives", 0)["rough"]
    assert rough.dtype == torch.float32
    assert bool((rough == total).all())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_row_is_owned_once_also_when_rows_are_fewer_than_ranks(size: int, outcome: Outcome) -> None:
    owned = [outcome(size, "collectives", rank)["own_rows"] for rank in ranks(size)]
    totals = [len(whole) for whole in outcome(size, "collectives", 0)["wholes"]]
    assert [sum(rows) for rows in zip(*owned, strict=True)] == totals


@pytest.mark.parametrize("size", [1, 2, 3])
def test_gathers_and_reductions_come_in_rank_order_on_every_rank(size: int, outcome: Outcome) -> None:
    for rank in ranks(size):
        found = outcome(size, "collectives", rank)
        assert [part[0, 0].item() for part in found["all"]] == list(ranks(size))
        assert [part.shape for part in found["none"]] == [(0, 3)] * size
        assert found["sum"].tolist() == [sum(ranks(size)), -sum(ranks(size))]
        assert found["max"].tolist() == [size - 1, 0]


# -- flips ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", ["exact_flips", "exact_int8_flips"])
def test_one_rank_on_two_samples_and_two_ranks_on_one_each_flip_the_same_signs(scenario: str, outcome: Outcome) -> None:
    alone = outcome(1, scenario, 0)
    for rank in ranks(2):
        shared = outcome(2, scenario, rank)
        assert shared["flips"] == alone["flips"]
        assert same_bits(shared, alone)
    assert all(sum(flips.values()) > 0 for flips in alone["flips"])


def test_how_many_reductions_overlap_with_backward_does_not_matter(outcome: Outcome) -> None:
    for rank in ranks(2):
        for found in outcome(2, "overlap", rank):
            assert same_bits(found, outcome(1, "exact_flips", 0))


@pytest.mark.parametrize("size", [2, 3])
def test_layers_with_fewer_rows_than_ranks_flip_as_on_one_rank(size: int, outcome: Outcome) -> None:
    alone = outcome(1, "small_layers", 0)
    for rank in ranks(size):
        shared = outcome(size, "small_layers", rank)
        assert shared["flips"] == alone["flips"]
        assert same_bits(shared, alone)
    assert sum(flips["two rows"] for flips in alone["flips"]) > 0


def test_flips_do_not_change_when_two_ranks_hand_over_to_one_and_that_to_three(outcome: Outcome) -> None:
    whole = outcome(1, "small_layers", 0)
    moved = [outcome(size, "moved_flips", 0) for size in (2, 1, 3)]
    assert [flips for part in moved for flips in part["flips"]] == whole["flips"]
    assert same_bits({"bits": [bits for part in moved for bits in part["bits"]]}, whole)


def test_columns_of_large_numbers_are_measured_alike_on_one_rank_and_two(outcome: Outcome) -> None:
    alone = outcome(1, "coarse_flips", 0)
    for rank in ranks(2):
        shared = outcome(2, "coarse_flips", rank)
        assert all(torch.equal(shared["columns"][name], column) for name, column in alone["columns"].items())
        assert same_bits(shared, alone)


@pytest.mark.parametrize("size", [2, 3])
def test_the_shards_of_the_evidence_are_the_rows_of_the_whole(size: int, outcome: Outcome) -> None:
    shards = [outcome(size, "small_layers", rank)["held"] for rank in ranks(size)]
    for name, whole in outcome(1, "small_layers", 0)["held"].items():
        assert torch.equal(torch.cat([shard[name]["evidence"] for shard in shards]), whole["evidence"])


@pytest.mark.parametrize("size", [2, 3])
def test_second_moments_are_those_of_one_rank_rows_sharded_and_columns_whole(size: int, outcome: Outcome) -> None:
    shards = [outcome(size, "small_layers", rank)["held"] for rank in ranks(size)]
    for name, whole in outcome(1, "small_layers", 0)["held"].items():
        torch.testing.assert_close(torch.cat([shard[name]["row"] for shard in shards]), whole["row"])
        for shard in shards:
            assert torch.equal(shard[name]["column"], shards[0][name]["column"])
            torch.testing.assert_close(shard[name]["column"], whole["column"])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_rank_holds_all_bits_and_its_share_of_the_evidence(size: int, outcome: Outcome) -> None:
    alone = outcome(1, "small_layers", 0)
    bits = sum(b.nbytes for b in alone["bits"][0].values())
    for rank in ranks(size):
        found = outcome(size, "small_layers", rank)
        shards, wholes = found["held"], alone["held"]
        moments = sum(4 * (len(shard["row"]) + len(shard["column"])) for shard in shards.values())
        evidence = sum(2 * shard["evidence"].numel() for shard in shards.values())
        assert found["state_bytes"] == bits + evidence + moments + sum(s["seen"].nbytes for s in shards.values())
        assert all(len(s["evidence"]) <= -(-len(wholes[n]["evidence"]) // size) for n, s in shards.items())


def test_a_nan_on_one_rank_stops_both_before_any_sign_changes(outcome: Outcome) -> None:
    for rank in ranks(2):
        found = outcome(2, "nan_gradient", rank)
        assert found["error"] == "NonFiniteGradient"
        assert "1 of 3 layers, first ragged" in found["message"]
        assert found["unchanged"]


def test_a_gradient_that_never_came_is_named_on_every_rank(outcome: Outcome) -> None:
    for rank in ranks(2):
        found = outcome(2, "missing_gradient", rank)
        assert found["error"] == "GradientContract"
        assert "layer ragged saw 0 gradients" in found["message"]


# -- measuring and fitting --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_share_the_windows_measure_what_one_does(size: int, outcome: Outcome) -> None:
    for shared, alone in zip(outcome(size, "quality", 0), outcome(1, "quality", 0), strict=True):
        assert shared.tokens == alone.tokens
        for name in ("nll", "perplexity", "kl_to_teacher", "top1_agreement"):
            assert getattr(shared, name) == pytest.approx(getattr(alone, name), rel=1e-6)
    assert all(outcome(size, "quality", rank) == outcome(size, "quality", 0) for rank in ranks(size))


@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_end_the_init_with_the_very_same_model(size: int, outcome: Outcome) -> None:
    first = outcome(size, "init", 0)
    for rank in ranks(size):
        found = outcome(size, "init", rank)
        for kind in ("bits", "scales"):
            assert all(torch.equal(found[kind][name], first[kind][name]) for name in first[kind])


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_reconstruct_blocks_on_their_own_windows_end_with_one_model(size: int, outcome: Outcome) -> None:
    first = outcome(size, "blockwise", 0)["all"]
    assert all(0.0 < error < 1.0 for error in first["errors"].values())
    for rank in ranks(size):
        found = outcome(size, "blockwise", rank)["all"]
        assert found["errors"] == first["errors"]
        for kind in ("bits", "parameters"):
            assert all(torch.equal(found[kind][name], first[kind][name]) for name in first[kind])


def test_two_ranks_reconstruct_what_one_does_with_all_windows_and_not_with_half_of_them(outcome: Outcome) -> None:
    shared, alone = outcome(2, "blockwise", 0)["all"], outcome(1, "blockwise", 0)
    far = {}
    for name, other in (("all", alone["all"]), ("half", alone["half"])):
        far[name] = sum(float((v - other["parameters"][n]).square().sum()) for n, v in shared["parameters"].items())
    assert far["all"] < 0.5 * far["half"]


@pytest.mark.parametrize("size", [2, 3])
def test_the_init_of_several_ranks_is_that_of_one_but_for_rounding(size: int, outcome: Outcome) -> None:
    shared, alone = outcome(size, "init", 0), outcome(1, "init", 0)
    error = (alone["logits"] - alone["dense"]).square().mean()
    assert float((shared["logits"] - alone["logits"]).square().mean()) < 1e-3 * float(error)
    bits = [(shared["bits"][n] != alone["bits"][n]).float().mean().item() for n in alone["bits"]]
    assert max(bits) < 0.02


# -- token files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3])
def test_token_files_have_the_same_bytes_whoever_made_them(size: int, outcome: Outcome) -> None:
    alone = outcome(1, "token_files", 0)
    assert {"all/part-000002.bin", "some/part-000001.bin", "some/index.json"} < alone.keys()
    assert "some/part-000002.bin" not in alone
    assert all(outcome(size, "token_files", rank) == alone for rank in ranks(size))
