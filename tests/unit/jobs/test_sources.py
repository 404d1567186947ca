"""What a server lets a job read."""

from __future__ import annotations

import json
import struct

import pytest

from jobs.errors import (
    BadDataType,
    BadWeights,
    EmptyData,
    OwnerNotAllowed,
    PathNotAllowed,
    PickleWeights,
    RemoteCode,
    UnknownData,
    UnknownModel,
)
from jobs.sources import SourcePolicy, locate_data, locate_model, resolve_data, resolve_model

TENSOR = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def safetensors(header, data=bytes(24)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def policy(root):
    return SourcePolicy(model_roots=(root,), data_roots=(root,), hub_owners=("kbop",))


@pytest.fixture
def model(root):
    folder = root / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(safetensors({"w": TENSOR, "__metadata__": {"format": "pt"}}))
    return folder


def test_a_sound_model_under_the_root_is_accepted(model, policy):
    source = resolve_model(str(model), policy)
    assert (source.kind, source.location) == ("path", str(model))


def test_a_model_outside_the_roots_is_refused(model, tmp_path):
    with pytest.raises(PathNotAllowed, match="not under an allowed folder"):
        resolve_model(str(model), SourcePolicy(model_roots=(tmp_path / "other",)))


def test_a_link_out_of_the_roots_is_refused(root, policy, tmp_path):
    (tmp_path / "secret").mkdir()
    (root / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(PathNotAllowed):
        resolve_model(str(root / "link"), policy)


def test_a_weight_file_that_links_out_of_the_roots_is_refused(model, policy, tmp_path):
    outside = tmp_path / "weights.safetensors"
    (model / "model.safetensors").rename(outside)
    (model / "model.safetensors").symlink_to(outside)
    with pytest.raises(PathNotAllowed, match="link out"):
        resolve_model(str(model), policy)


@pytest.mark.parametrize("name", ["./model", "../model"])
def test_a_relative_path_is_refused(name, policy):
    with pytest.raises(PathNotAllowed, match="relative"):
        resolve_model(name, policy)
    with pytest.raises(PathNotAllowed, match="relative"):
        resolve_data(name + ".txt", policy)


@pytest.mark.parametrize("name", ["builtin:nothing", "model", "a/b/c", "owner/", "http://x/y", "", "owner/name@"])
def test_a_name_of_no_known_form_is_unknown(name, policy):
    with pytest.raises(UnknownModel):
        resolve_model(name, policy)
    with pytest.raises(UnknownData):
        resolve_data(name, policy)


def test_a_folder_that_is_not_there_is_unknown(root, policy):
    with pytest.raises(UnknownModel, match="no model folder"):
        resolve_model(str(root / "gone"), policy)


@pytest.mark.parametrize("config", [None, "", "[]", "{"])
def test_a_folder_without_a_readable_config_is_no_model(model, policy, config):
    (model / "config.json").unlink() if config is None else (model / "config.json").write_text(config)
    with pytest.raises(UnknownModel, match=r"config\.json"):
        resolve_model(str(model), policy)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_model_that_brings_code_is_refused(model, policy, file):
    (model / file).write_text('{"auto_map": {"AutoModel": "evil.Model"}}')
    with pytest.raises(RemoteCode, match="auto_map"):
        resolve_model(str(model), policy)


def test_weights_only_as_pickle_are_refused(model, policy):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(PickleWeights):
        resolve_model(str(model), policy)


def test_a_model_without_weights_is_refused(model, policy):
    (model / "model.safetensors").unlink()
    with pytest.raises(BadWeights, match=r"no \.safetensors"):
        resolve_model(str(model), policy)


def test_a_missing_shard_is_named(model, policy):
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model-2.safetensors"}}')
    with pytest.raises(BadWeights, match=r"model-2\.safetensors"):
        resolve_model(str(model), policy)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 1 << 62) + b"{}",
        safetensors(b"not json"),
        safetensors([]),
        safetensors({"w": TENSOR}, bytes(23)),
        safetensors({"w": TENSOR}, bytes(25)),
        safetensors({"w": TENSOR | {"shape": [2, 4]}}),
        safetensors({"w": TENSOR | {"shape": [-2, -3]}}),
        safetensors({"w": TENSOR | {"dtype": "PICKLE"}}),
        safetensors({"w": TENSOR | {"data_offsets": [24, 0]}}),
        safetensors({"w": TENSOR | {"data_offsets": None}}),
        safetensors({"w": TENSOR, "v": TENSOR}),
        safetensors({"w": 3}),
    ],
)
def test_a_damaged_weight_file_is_refused(model, policy, content):
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(BadWeights, match=r"model\.safetensors"):
        resolve_model(str(model), policy)


@pytest.mark.parametrize("name", ["kbop/model", "kbop/model@v1.0", "kbop/model@refs/pr/1"])
def test_an_allowed_hub_owner_is_accepted_with_its_revision(name, policy):
    source = resolve_model(name, policy)
    assert (source.kind, source.location) == ("hub", "kbop/model")
    assert (source.revision or "") == name.partition("@")[2]


def test_a_hub_owner_that_is_not_listed_is_refused(policy):
    with pytest.raises(OwnerNotAllowed, match="someone"):
        resolve_model("someone/model", policy)
    with pytest.raises(OwnerNotAllowed):
        resolve_data("someone/data", policy)


def test_a_star_allows_every_hub_owner():
    assert resolve_data("someone/data", SourcePolicy(hub_owners=("*",))).location == "someone/data"


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_a_text_file_under_the_root_is_accepted(root, policy, suffix):
    (root / f"text{suffix}").write_text("words")
    assert resolve_data(str(root / f"text{suffix}"), policy).kind == "file"


@pytest.mark.parametrize("suffix", ["", ".csv", ".pkl", ".TXT.exe"])
def test_a_file_of_another_type_is_refused(root, policy, suffix):
    (root / f"text{suffix}").write_text("words")
    with pytest.raises(BadDataType) as refused:
        resolve_data(str(root / f"text{suffix}"), policy)
    assert refused.value.hint == "use one of .txt, .jsonl, .parquet"


def test_an_empty_a_missing_and_a_forbidden_file_are_refused(root, policy, tmp_path):
    (root / "empty.txt").touch()
    with pytest.raises(EmptyData):
        resolve_data(str(root / "empty.txt"), policy)
    with pytest.raises(UnknownData):
        resolve_data(str(root / "gone.txt"), policy)
    with pytest.raises(PathNotAllowed):
        resolve_data(str(tmp_path / "other.txt"), policy)


def test_locating_needs_no_policy(model):
    assert locate_model(str(model)).location == str(model)
    assert locate_model("builtin:demo").kind == "builtin"
    assert locate_data("builtin:python-docs").location == "python-docs"
