"""Bytes of a rank between backward and the next step: each formula beside the tensors that KBOP really makes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from jobs import tensor_sizes
from jobs.memory_plan import MemoryPlan
from jobs.model_shape import shape_of_config
from jobs.plan import Plan
from jobs.plan_request import PlanRequest
from jobs.tensor_sizes import CANDIDATE, SELECTION, choosing_bytes, columns_bytes, largest_handful
from kbop_core import evidence, kbop, selection, shard
from kbop_core.kbop import KBOP
from kbop_core.layers import BinaryLinear
from kbop_core.schedules import FlipSchedule
from kbop_core.shard import Gang
from tests.unit.jobs.live_bytes import allocated_by

#: Six layers of equal size and one that is as large.
CONFIG = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "vocab_size": 100,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip


class Alike(Gang):
    """Ranks that all hold what this one holds."""

    def all_gather(self, part: Tensor) -> list[Tensor]:
        whole = torch.cat([part.reshape(-1)] * self.size)
        return [piece.view(part.shape) for piece in whole.split(part.numel())]

    def sum(self, value: Tensor) -> Tensor:
        return value.mul_(self.size)


class Arrived:
    """A collective that is done."""

    def wait(self) -> None:
        pass


def plan(**request: Any) -> MemoryPlan:
    settings = {"device": "cpu", "context": 16, "group_size": 64, "flip_rate": 0.004}
    return MemoryPlan(shape_of_config(CONFIG, "x"), PlanRequest(**settings | request))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes given to each all-to-all, which brings back what it was given."""
    given: list[int] = []

    def exchange(received: Tensor, tensor: Tensor, **_: Any) -> Arrived:
        given.append(tensor.nbytes)
        received.copy_(tensor)
        return Arrived()

    monkeypatch.setattr(shard.dist, "all_to_all_single", exchange)
    return given


def optimizer(planned: MemoryPlan) -> KBOP:
    """A step is under way: there are projections."""
    sizes = ((la.name, la.in_features, la.out_features) for la in planned.binary)
    layers = {name: BinaryLinear(wide, high, False, 64, trainable=True) for name, wide, high in sizes}
    asked = planned.request
    schedule = FlipSchedule(asked.flip_rate, 9, 1)
    made = KBOP(layers, schedule, gang=Alike(0, asked.ranks), evidence=asked.evidence)
    for one in made.shards.values():
        one.moments.project(torch.zeros(len(one.moments.row), one.moments.width), made._probes)
    return made


def receive_all(kbop_: KBOP) -> None:
    for one in reversed(list(kbop_.shards.values())):
        kbop_._receive(one, torch.randn(one.layer.out_features, one.layer.in_features))


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_one_exchange_is_under_way_beside_the_gradient_that_was_just_made(
    kind: Any, ranks: int, sent: list[int]
) -> None:
    planned = plan(evidence=kind, ranks=ranks)
    largest = planned.largest
    expected = 4 * largest.weights + (planned._in_flight if ranks > 1 else planned._adding(largest))
    made = optimizer(planned)
    assert allocated_by(lambda: receive_all(made)) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("columns", [256, 250])
@pytest.mark.parametrize("at_once", [1, 2560, 2**24])
def test_int8_evidence_is_decoded_as_many_rows_at_a_time_as_planned(
    columns: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "AT_ONCE", at_once)
    monkeypatch.setattr("jobs.memory_plan.EVIDENCE_AT_ONCE", at_once)
    layer = replace(plan().binary[0], in_features=columns, out_features=64)
    store, gradient = evidence.make_evidence("int8", 64, columns, torch.device("cpu")), torch.randn(64, columns)
    expected = plan(evidence="int8")._adding(layer)
    assert allocated_by(lambda: store.add(gradient, 0.1)) == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_moments_of_columns_take_the_bytes_planned(ranks: int, sent: list[int]) -> None:
    planned = plan(ranks=ranks)
    columns = sum(la.in_features for la in planned.binary)
    expected = columns_bytes(columns, ranks)
    assert allocated_by(optimizer(planned)._take_moments) == pytest.approx(expected, rel=0.02)


def test_a_rank_sends_as_much_of_the_moments_as_planned(sent: list[int]) -> None:
    planned = plan(ranks=4)
    optimizer(planned)._take_moments()
    back = 4 * sum(la.in_features for la in planned.binary)
    traffic = Plan(planned.shape, planned.request).traffic["moments"]
    assert traffic == 3 * (sum(sent) + back) / 4


@pytest.mark.parametrize("wanted", [10, 3000, 20_000, 90_000])
@pytest.mark.parametrize("scores", [50_000, 200_000])
def test_candidates_are_found_with_the_bytes_planned(wanted: int, scores: int) -> None:
    values = torch.rand(scores)
    made = allocated_by(lambda: selection.largest(values, wanted))
    assert made == pytest.approx(choosing_bytes(scores, wanted), rel=0.1)


def test_candidates_keep_their_value_and_their_place() -> None:
    values, places = selection.largest(torch.rand(1000), 10)
    assert values.nbytes + places.nbytes == 10 * CANDIDATE


@pytest.mark.parametrize("handful", [1, 9000, 2**22])
@pytest.mark.parametrize("layers", [1, 5])
def test_finding_the_thresholds_takes_the_bytes_planned_for_a_handful(
    layers: int, handful: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "HANDFUL", handful)
    values = [2 + torch.rand(4000) for _ in range(layers)]  # all begin with the same digit
    made = allocated_by(lambda: selection.kth_largest(values, [3000] * layers, Gang()))
    counts = 4 * selection.BASE * layers
    assert made == pytest.approx(SELECTION * largest_handful([4000] * layers, handful), abs=6 * counts)


@pytest.mark.parametrize("enough", [1, 40_000, 2**24])
@pytest.mark.parametrize("ranks", [2, 4])
def test_bits_are_gathered_with_the_bytes_planned(ranks: int, enough: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kbop, "BITS_AT_ONCE", enough)
    monkeypatch.setattr("jobs.memory_plan.BITS_AT_ONCE", enough)
    planned = plan(ranks=ranks)
    assert allocated_by(optimizer(planned)._share_bits) == pytest.approx(planned._gathered_bits, rel=0.02)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("rate", [0.0, 0.004, 0.05, 0.2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_flips_of_a_step_take_the_bytes_planned(kind: Any, rate: float, ranks: int, sent: list[int]) -> None:
    planned = plan(evidence=kind, flip_rate=rate, ranks=ranks)
    made = optimizer(planned)
    receive_all(made)
    while made._pending:
        made._fold(*made._pending.popleft())
    assert allocated_by(made.step) == pytest.approx(planned._flips, rel=0.1)


@pytest.mark.parametrize(("most", "largest"), [(1, 9), (6, 9), (11, 11), (23, 23)])
def test_layers_are_looked_at_together_as_planned(most: int, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "HANDFUL", most)
    sizes = [3, 3, 5, 1, 9, 2]
    parts = selection._handfuls([torch.zeros(size) for size in sizes])
    assert largest_handful(sizes, most) == max(sum(sizes[part]) for part in parts) == largest


def test_numbers_of_a_step_are_the_cores() -> None:
    sizes = tensor_sizes
    assert (sizes.HANDFUL, sizes.BITS_AT_ONCE) == (selection.HANDFUL, kbop.BITS_AT_ONCE)
    assert (sizes.EVIDENCE_BLOCK, sizes.EVIDENCE_AT_ONCE) == (evidence.BLOCK, evidence.AT_ONCE)
    assert torch.zeros(1, dtype=Gang().wire).nbytes == sizes.WIRE
    assert optimizer(plan()).in_flight == sizes.IN_FLIGHT
