"""What a job spec accepts: defaults, and refusals of settings that could not take effect."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from jobs.spec import RECIPES, JobSpec, weights_of
from kbop_core.init.blockwise import BlockEffort

QUICK = {"effort": "quick"}
BASE: dict[str, Any] = {"model": "builtin:demo", "data": [{"source": "builtin:python-docs"}]}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": {"effort": "quick", "tokens": 5}}, "method.tokens has no effect"),
        ({"method": {"effort": "quick", "flip_rate": 0.01}}, "method.flip_rate has no effect"),
        ({"method": {"effort": "quick", "flip_rate": 0.0}}, "method.flip_rate has no effect"),
        ({"method": {"effort": "quick", "momentum": 0.98}}, "method.momentum has no effect"),
        ({"method": {"effort": "quick", "evidence": "int8"}}, "method.evidence has no effect"),
        ({"method": {"effort": "max", "tokens": 5}}, "give one of the two"),
        ({"method": {"effort": "quick"}, "init": "random"}, "keeps the initial signs"),
        ({"resources": {"offload": "blocks"}}, "trains block by block: use effort 'quick'"),
        ({"method": {"calibration_tokens": 9}, "init": "random"}, "calibration_tokens has no effect"),
        ({"method": {"blockwise_steps": 9}, "init": "random"}, "blockwise_steps has no effect"),
        ({"method": QUICK, "resources": {"teacher": "cached"}}, "teacher has no effect .*: use offload 'blocks'"),
        ({"method": QUICK, "resources": {"teacher": "offloaded"}}, "teacher has no effect"),
        ({"method": QUICK, "resources": {"teacher": "sharded", "gpus": 2}}, "teacher has no effect"),
        (
            {"method": QUICK, "resources": {"activation_checkpointing": True}},
            r"activation_checkpointing has no effect with effort 'quick' \(no training\)",
        ),
        ({"method": QUICK, "resources": {"zero_stage": 3}}, "zero_stage has no effect"),
        ({"resources": {"teacher": "sharded"}}, r"divides the teacher over ranks: use more gpus, or 'offloaded'"),
    ],
)
def test_a_setting_that_cannot_take_effect_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        JobSpec.model_validate(BASE | changes)


def test_the_stored_spec_is_accepted_again_with_every_default_filled_in() -> None:
    for method in ({"effort": "quick"}, {"effort": "max"}, {"tokens": 7}):
        spec = JobSpec.model_validate(BASE | {"method": method})
        assert JobSpec.model_validate_json(spec.canonical_json()) == spec


def test_momentum_is_the_trainings_own_choice_unless_it_is_given() -> None:
    for method in ({}, {"momentum": None}, {"effort": "quick", "momentum": None}):
        spec = JobSpec.model_validate(BASE | {"method": method})
        assert (spec.method.flip_rate, spec.method.momentum, spec.method.evidence) == (0.004, None, "bfloat16")


def test_a_spec_stored_when_flip_rate_could_be_null_is_accepted() -> None:
    stored = JobSpec.model_validate(BASE).canonical_json().replace('"flip_rate":0.004', '"flip_rate":null')
    assert "null" in stored and JobSpec.model_validate_json(stored).method.flip_rate == 0.004


def test_blocks_of_pretrained_models_are_reconstructed_unless_the_spec_says_otherwise() -> None:
    for method, steps in (
        ({"effort": "quick"}, BlockEffort().steps),
        ({}, BlockEffort().steps),
        ({"effort": "max"}, 4 * BlockEffort().steps),
        ({"effort": "max", "blockwise_steps": 7}, 7),
        ({"blockwise_steps": 0}, 0),
    ):
        assert JobSpec.model_validate(BASE | {"method": method}).blockwise_steps == steps
    assert JobSpec.model_validate(BASE | {"init": "random"}).blockwise_steps == 0


@pytest.mark.parametrize("field", [{"flip_rate": 0}, {"flip_rate": 0.5}, {"momentum": 0}, {"momentum": 0.9999}])
def test_the_ends_of_a_range_are_legal(field: dict[str, float]) -> None:
    spec = JobSpec.model_validate(BASE | {"method": field})
    assert spec.method.model_dump() | field == spec.method.model_dump()


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ({"flip_rate": 0.50001}, "less than or equal to 0.5"),
        ({"flip_rate": -1e-9}, "greater than or equal to 0"),
        ({"flip_rate": float("nan")}, "equal to"),
        ({"momentum": 0.99991}, "less than or equal to 0.9999"),
        ({"momentum": 1}, "less than or equal to 0.9999"),
        ({"momentum": -0.1}, "greater than or equal to 0"),
        ({"momentum": float("nan")}, "equal to"),
        ({"evidence": "float32"}, "'bfloat16' or 'int8'"),
        ({"evidence": None}, "'bfloat16' or 'int8'"),
    ],
)
def test_a_value_out_of_its_range_is_refused_with_the_range(field: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        JobSpec.model_validate(BASE | {"method": field})


@pytest.mark.parametrize(
    "resources",
    [
        {"teacher": "sharded", "gpus": 2, "activation_checkpointing": True, "zero_stage": 3},
        {"teacher": "offloaded"},
        {"teacher": "cached", "zero_stage": 0},
    ],
)
def test_every_place_of_the_teacher_and_every_zero_stage_can_be_asked_for(resources: dict[str, Any]) -> None:
    spec = JobSpec.model_validate(BASE | {"resources": resources})
    assert spec.resources.model_dump() | resources == spec.resources.model_dump()
    assert JobSpec.model_validate_json(spec.canonical_json()) == spec


def test_a_spec_stored_before_the_teacher_had_a_place_is_accepted_and_keeps_it_resident() -> None:
    stored = JobSpec.model_validate(BASE).model_dump(mode="json")
    for field in ("teacher", "activation_checkpointing"):
        del stored["resources"][field]
    resources = JobSpec.model_validate(stored).resources
    assert (resources.teacher, resources.activation_checkpointing, resources.zero_stage) == ("resident", False, 1)


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ({"zero_stage": 4}, "0, 1, 2 or 3"),
        ({"teacher": "nowhere"}, "'resident', 'offloaded', 'sharded' or 'cached'"),
        ({"activation_checkpointing": 2}, "boolean"),
    ],
)
def test_a_resource_that_does_not_exist_is_refused_with_those_that_do(field: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        JobSpec.model_validate(BASE | {"resources": field})


@pytest.mark.parametrize("effort", ["quick", "standard", "max"])
def test_each_effort_stands_for_a_number_of_tokens(effort: str) -> None:
    assert JobSpec.model_validate(BASE | {"method": {"effort": effort}}).train_tokens == RECIPES[effort].tokens


def test_without_evaluation_text_the_held_out_part_of_the_training_text_is_used() -> None:
    train, evaluation = JobSpec.model_validate(BASE).resolved_data()
    assert ([d.split for d in train], [d.split for d in evaluation]) == (["train"], ["eval"])


def test_equal_specs_have_equal_digests_and_others_have_not() -> None:
    one, same, other = (JobSpec.model_validate(BASE | {"seed": seed}) for seed in (1, 1, 2))
    assert one.digest() == same.digest() != other.digest()


def sources(*weights: float | None) -> list[dict[str, Any]]:
    return [{"source": f"/{n}.txt"} | ({} if w is None else {"weight": w}) for n, w in enumerate(weights)]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"eval": sources(None, 1.0)}, r"eval\[1\].weight has no effect"),
        ({"data": sources(2.0)}, r"data\[0\].weight has no effect: there is no other source"),
        ({"data": sources(1.0, None, 3.0)}, r"data\[1\] has no weight and others have"),
    ],
)
def test_a_weight_that_cannot_take_effect_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        JobSpec.model_validate(BASE | changes)


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (0, "greater than 0"),
        (-1.0, "greater than 0"),
        (float("nan"), "finite number"),
        (float("inf"), "finite number"),
        (1e6 + 1, "less than or equal to 1000000"),
        ("much", "valid number"),
    ],
)
def test_a_weight_that_is_no_positive_number_is_refused(weight: Any, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        JobSpec.model_validate(BASE | {"data": sources(1.0, weight)})


def test_weights_go_with_the_training_side_of_a_source_alone() -> None:
    train, evaluation = JobSpec.model_validate(BASE | {"data": sources(1, 0.5)}).resolved_data()
    assert (weights_of(train), weights_of(evaluation)) == ([1.0, 0.5], None)
    assert weights_of(JobSpec.model_validate(BASE | {"data": sources(None, None)}).data) is None
