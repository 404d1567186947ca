"""How mistakes in a spec are named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from service.spec_errors import InvalidJson, InvalidSpec, parse_spec

MINIMAL: dict[str, Any] = {"model": "builtin:demo", "data": [{"source": "builtin:python-docs"}]}


def mistakes(**changes: Any) -> dict[str, str]:
    with pytest.raises(InvalidSpec) as caught:
        parse_spec(json.dumps(MINIMAL | changes))
    return dict(caught.value.errors)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("flip_rate", 0.9, "Input should be less than or equal to 0.5, got 0.9"),
        ("momentum", 0.99995, "Input should be less than or equal to 0.9999, got 0.99995"),
        ("momentum", "long", "Input should be a valid number, got 'long'"),
        ("evidence", "fp8", "Input should be 'bfloat16' or 'int8', got 'fp8'"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_pointer_limit_and_value(field: str, value: Any, says: str) -> None:
    assert mistakes(method={field: value}) == {f"/method/{field}": says}


def test_an_unknown_field_is_named_and_the_right_place_is_suggested() -> None:
    assert mistakes(flip_rate=0.1) == {"/flip_rate": "unknown field; did you mean /method/flip_rate?"}
    assert mistakes(sede=1) == {"/sede": "unknown field; did you mean /seed?"}
    assert mistakes(zzzzzz=1) == {"/zzzzzz": "unknown field"}


@pytest.mark.parametrize("value", ["5", True, 1.5, None, [1], {}])
def test_wrong_types_are_refused_without_guessing(value: Any) -> None:
    assert list(mistakes(seed=value)) == ["/seed"]


def test_pointers_reach_into_lists_and_escape_slashes() -> None:
    found = mistakes(data=[{"source": "a"}, {"source": "", "a/b~c": 1}])
    assert set(found) == {"/data/1/source", "/data/1/a~1b~0c"}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000])
def test_numbers_no_json_has_are_mistakes_of_the_caller(number: str) -> None:
    text = json.dumps(MINIMAL)[:-1] + f', "method": {{"momentum": {number}}}, "seed": {number}}}'
    with pytest.raises((InvalidJson, InvalidSpec)):
        parse_spec(text)


@pytest.mark.parametrize("text", ["", "{", "nope", b"\xff\xfe", "[" * 100_000, '{"model": "\\ud800"}'])
def test_text_that_is_not_json_is_called_so(text: str | bytes) -> None:
    with pytest.raises(InvalidJson):
        parse_spec(text)


def test_a_setting_without_effect_is_explained_for_the_whole_document() -> None:
    found = mistakes(method={"effort": "quick", "tokens": 10})
    assert list(found) == [""] and "method.tokens has no effect" in found[""]
