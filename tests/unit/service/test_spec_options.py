"""Specs from files and options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.spec_options import SpecInputError, SpecOptions, absolute_source


def test_options_alone_make_a_minimal_spec() -> None:
    built = SpecOptions(model="builtin:demo", data=("builtin:python-docs",), tokens=10, gpus=2).build()
    assert built == {
        "model": "builtin:demo",
        "data": [{"source": "builtin:python-docs"}],
        "method": {"tokens": 10},
        "resources": {"gpus": 2},
    }


def test_options_replace_the_files_fields_and_leave_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "spec.json"
    file.write_text(json.dumps({"model": "a/b", "data": [{"source": "c/d"}], "seed": 1, "keep": ["x"]}))
    built = SpecOptions(file=file, seed=2).build()
    assert built["seed"] == 2 and built["model"] == "a/b" and built["keep"] == ["x"]


def test_set_reaches_nested_fields_with_json_or_plain_text() -> None:
    options = SpecOptions(model="m", data=("d",), settings=("method.flip_rate=0.01", 'keep=["a"]', "init=random"))
    built = options.build()
    assert (built["method"], built["keep"], built["init"]) == ({"flip_rate": 0.01}, ["a"], "random")


def test_relative_paths_of_a_file_start_at_the_file(tmp_path: Path) -> None:
    file = tmp_path / "spec.json"
    file.write_text(json.dumps({"model": "./m", "data": [{"source": "../d.txt"}]}))
    built = SpecOptions(file=file).build()
    assert built["model"] == str(tmp_path / "m") and built["data"][0]["source"] == str(tmp_path.parent / "d.txt")


def test_hub_ids_and_builtins_are_not_taken_for_paths(tmp_path: Path) -> None:
    assert [absolute_source(s, tmp_path) for s in ("a/b", "builtin:demo", "/x")] == [
        "a/b",
        "builtin:demo",
        "/x",
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (SpecOptions(), "--model and --data"),
        (SpecOptions(model="m"), "--data"),
        (SpecOptions(model="m", data=("d",), settings=("seed",)), "KEY=VALUE"),
        (SpecOptions(model="m", data=("d",), settings=("model.x=1",)), "not an object"),
        (SpecOptions(file=Path("missing.json")), "cannot be read"),
    ],
)
def test_nonsense_is_refused_in_words(options: SpecOptions, words: str) -> None:
    with pytest.raises(SpecInputError, match=words):
        options.build()


@pytest.mark.parametrize("text", ["{", "[]", '{"seed": NaN}', ""])
def test_a_file_that_is_not_a_json_object_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "spec.json"
    file.write_text(text)
    with pytest.raises(SpecInputError, match=r"spec\.json"):
        SpecOptions(file=file).build()
