"""What a plan says beyond bytes of a rank: fits, traffic, time, advice, the table."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from jobs.errors import BadPlan
from jobs.plan import USABLE, Plan, Speed, derived_speed, speed_from_report
from jobs.plan_request import PlanRequest, request_from_spec
from jobs.plan_table import GB, cells, first_that_fits, known_shape, placement
from jobs.spec import JobSpec


def plan(name: str = "0.6B", memory: int | None = None, tokens: int = 0, **request: Any) -> Plan:
    shape = known_shape(name)
    assert shape is not None
    return Plan(shape, PlanRequest(**request), memory, tokens)


def spec(**changes: Any) -> JobSpec:
    return JobSpec.model_validate({"model": "m", "data": [{"source": "d"}], **changes})


def test_a_plan_fits_up_to_the_usable_share_of_the_device() -> None:
    most = plan().peak.bytes / USABLE
    assert plan(memory=int(most) + 1).fits and plan(memory=int(most) - 1).fits is False
    assert plan().fits is None


def test_latent_weights_cost_two_bytes_and_sixteen_of_what_a_rank_owns() -> None:
    for ranks in (1, 8):
        made = plan(ranks=ranks)
        assert made.latent_bytes / made.memory.binary_weights == pytest.approx(2 + 16 / ranks, rel=1e-6)


def test_kbop_holds_less_than_a_quarter_of_what_latent_weights_would() -> None:
    for ranks in (1, 8, 16):
        assert plan("8B", ranks=ranks).kbop_bytes < plan("8B", ranks=ranks).latent_bytes / 4


def test_one_rank_sends_nothing() -> None:
    assert plan(ranks=1).traffic == {}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_sign_gradients_are_sent_once_per_micro_step_in_half_precision(device: Any) -> None:
    made = plan(ranks=4, micro_steps=3, device=device)
    assert made.traffic["sign gradients"] == 3 * 2 * made.memory.binary_weights * 3 // 4
    assert made.traffic["bits"] == made.memory.binary_weights // 8 * 3 // 4


def test_a_sharded_teacher_is_sent_and_a_resident_one_is_not() -> None:
    made = plan(ranks=2, teacher="sharded")
    assert made.traffic["teacher"] == made.shape.parameters and "teacher" not in plan(ranks=2).traffic


@pytest.mark.parametrize(
    ("stage", "gradients", "parameters"), [(0, 1.0, 0.0), (1, 0.5, 0.5), (2, 1.5, 0.5), (3, 1.5, 3.0)]
)
def test_zero_stages_send_what_their_collectives_do(stage: int, gradients: float, parameters: float) -> None:
    made = plan(ranks=2, micro_steps=3, zero_stage=stage)
    whole = 2 * made.memory.real
    assert made.traffic["real gradients"] == pytest.approx(gradients * whole, rel=1e-6)
    assert made.traffic.get("real parameters", 0) == pytest.approx(parameters * whole, rel=1e-6)


def test_thresholds_take_four_sums_of_a_kilobyte_a_layer_whatever_the_rate() -> None:
    for rate in (0.001, 0.5):
        made = plan(ranks=2, flip_rate=rate)
        assert made.traffic["thresholds"] == 4 * 1024 * len(made.memory.binary)


def test_a_cached_teacher_takes_disk_and_no_memory() -> None:
    made = plan(teacher="cached", tokens=1000)
    assert made.disk_bytes["teacher's targets"] == 386_000 and made.memory.teacher == 0
    assert list(plan(tokens=1000).disk_bytes) == ["checkpoints"]


def test_checkpoints_hold_every_ranks_state_three_times() -> None:
    one, four = plan(), plan(ranks=4)
    columns = 4 * sum(la.in_features for la in one.memory.binary)
    assert one.disk_bytes["checkpoints"] == 3 * one.memory.snapshot
    assert four.disk_bytes["checkpoints"] == one.disk_bytes["checkpoints"] + 9 * columns
    assert 4 * four.memory.snapshot == pytest.approx(one.memory.snapshot, rel=0.01)


def test_a_gpus_host_reads_a_resident_teacher_whole_and_others_by_blocks() -> None:
    whole, by_blocks = plan("8B", ranks=8), plan("8B", ranks=8, teacher="sharded")
    assert whole.host_bytes == 2 * whole.shape.parameters and by_blocks.host_bytes < whole.host_bytes / 3
    assert plan("8B", ranks=8, device="cpu").host_bytes == whole.memory.snapshot


def test_flops_per_token_are_eight_a_weight_and_attention() -> None:
    made = plan(context=1)
    matrices = sum(la.weights for la in made.shape.linears) + made.shape.vocabulary * made.shape.hidden
    assert made.flops_per_token == pytest.approx(8 * matrices, rel=0.01)
    assert plan(context=2048).flops_per_token > made.flops_per_token


def test_time_is_tokens_over_the_stated_throughput_and_unknown_without_one() -> None:
    assert replace(plan(tokens=1000), speed=Speed(50.0, "stated")).seconds == 20.0
    assert plan(tokens=1000).seconds is None


def test_a_report_gives_its_jobs_throughput() -> None:
    report = {"job_id": "job_7", "training": {"tokens": 1000}, "time": {"stages": {"train": 4.0}}}
    assert speed_from_report(report) == Speed(250.0, "measured in job job_7")


@pytest.mark.parametrize("report", [{}, {"training": {"tokens": 0}, "time": {"stages": {"train": 4.0}}}])
def test_a_report_without_training_gives_none(report: dict[str, Any]) -> None:
    with pytest.raises(BadPlan, match="no training"):
        speed_from_report(report)


def test_derived_throughput_grows_with_ranks_and_says_where_it_comes_from() -> None:
    one, two = (derived_speed(plan(ranks=ranks), 1e15, 0.4) for ranks in (1, 2))
    assert two.tokens_per_s == pytest.approx(2 * one.tokens_per_s) and "40%" in one.source


@pytest.mark.parametrize(("flops", "share"), [(0.0, 0.4), (float("nan"), 0.4), (1e15, 0.0), (1e15, 1.1)])
def test_impossible_flops_are_refused(flops: float, share: float) -> None:
    with pytest.raises(BadPlan, match="FLOP/s"):
        derived_speed(plan(), flops, share)


@pytest.mark.parametrize("changes", [{"memory": 0}, {"tokens": -1}])
def test_impossible_sizes_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(BadPlan):
        plan(**changes)


def test_every_suggestion_lowers_the_peak_and_the_best_comes_first() -> None:
    made = plan("8B", ranks=2, micro_batch=4)
    sizes = [size for _, size in made.suggestions()]
    assert sizes and sizes == sorted(sizes) and sizes[-1] < made.peak.bytes


def test_a_spec_says_how_a_job_is_planned() -> None:
    changes = {"method": {"batch_tokens": 8192, "context": 512}, "resources": {"gpus": 2, "max_micro_batch": 4}}
    made = request_from_spec(spec(**changes), None, "cpu")
    assert (made.ranks, made.context, made.micro_batch, made.micro_steps, made.device) == (2, 512, 4, 2, "cpu")


def test_windows_are_the_models_own_up_to_2048_tokens() -> None:
    assert [request_from_spec(spec(), own, "cuda").context for own in (256, 4096, None)] == [256, 2048, 2048]


def test_a_plan_is_plain_json() -> None:
    made = replace(plan("1.7B", 80 * GB, 1000, ranks=8), speed=Speed(10.0, "stated"))
    told = json.loads(json.dumps(made.to_json()))
    assert told["memory"]["peak_bytes"] == sum(made.peak.parts.values()) and told["time"]["source"] == "stated"


def test_the_table_never_calls_a_plan_fitting_that_does_not_fit() -> None:
    found = list(cells(2048))
    assert len(found) == 20
    for cell in found:
        assert cell.chosen.peak.bytes <= USABLE * cell.machine.memory or cell.chosen.fits is False


def test_the_table_changes_nothing_where_the_defaults_fit() -> None:
    smallest = next(iter(cells(2048)))
    assert smallest.default.fits and placement(smallest.chosen) in ("defaults", "micro-batch 2", "micro-batch 4")


def test_the_first_way_that_fits_changes_what_it_must_and_keeps_the_rest() -> None:
    base = plan("1.7B", 20 * GB, group_size=64)
    found = first_that_fits(base, [1])
    assert base.fits is False and found.fits and found.request.group_size == 64
    assert replace(found.request, activation_checkpointing=False) == base.request


def test_where_nothing_fits_the_way_with_the_least_memory_is_told() -> None:
    base = plan("70B", 24 * GB)
    found = first_that_fits(base, [1])
    assert found.fits is False and found.peak.bytes < base.peak.bytes / 2
    assert found.request.evidence == "int8"


def test_a_smaller_micro_batch_makes_more_micro_steps() -> None:
    made = plan("8B", micro_batch=4, context=2048)
    halved = plan("8B", micro_batch=2, micro_steps=2, context=2048)
    assert ("micro-batch 2 instead of 4", halved.peak.bytes) in made.suggestions()
