"""The packed checkpoint: what is in the file, what verification notices, and writing whole or not at all."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from kbop_core import checkpoint
from kbop_core.bits import packed_width
from kbop_core.checkpoint import (
    load_student,
    save_student,
    save_tensors,
    sha256,
    verify_packed,
    write_json,
    write_packed,
)
from kbop_core.convert import ConversionPlan, binary_layers, convert_plain, plan_conversion
from kbop_core.errors import BadCheckpoint, BadWeights, DiskFull
from kbop_core.hf import load_model

pytestmark = pytest.mark.usefixtures("no_leftovers")

SourceFolder = Callable[[str], Path]
Packed = tuple[PreTrainedModel, ConversionPlan, Path, Path]


def make_student(source: Path) -> tuple[PreTrainedModel, ConversionPlan]:
    model = load_model(str(source))
    plan = plan_conversion(model, 4)
    convert_plain(model, plan, trainable=True)
    return model, plan


@pytest.fixture
def packed(tmp_path: Path, source_folder: SourceFolder) -> Packed:
    """(student, plan, source folder, packed folder) of a tiny Qwen2, which has biases."""
    source = source_folder("qwen2")
    model, plan = make_student(source)
    write_packed(model, plan, tmp_path / "out", str(source), None, torch.float32, {"run": "test"})
    return model, plan, source, tmp_path / "out"


# -- what is written --------------------------------------------------------------------------------------------------


def test_the_file_holds_bits_scales_and_the_rest_and_nothing_else(packed: Packed) -> None:
    model, plan, source, folder = packed
    tensors, dense = load_file(folder / "model.safetensors"), load_file(source / "model.safetensors")
    assert tensors.keys() == dense.keys() | {f"{e.name}.weight_scale" for e in plan.binary}
    for entry in plan.binary:
        bits, scale = tensors[f"{entry.name}.weight"], tensors[f"{entry.name}.weight_scale"]
        assert (bits.dtype, bits.shape) == (torch.uint8, (entry.out_features, packed_width(entry.in_features)))
        assert (scale.dtype, scale.shape) == (torch.float16, (entry.out_features, entry.groups))
    layers = binary_layers(model)
    assert all(torch.equal(tensors[f"{n}.weight"], layer.weight) for n, layer in layers.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_full_precision_tensors_take_the_dtype_asked_for(
    dtype: torch.dtype, tmp_path: Path, source_folder: SourceFolder
) -> None:
    source = source_folder("qwen2")
    model, plan = make_student(source)
    write_packed(model, plan, tmp_path / "out", str(source), None, dtype, {})
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    others = {n: t.dtype for n, t in tensors.items() if t.dtype != torch.uint8 and not n.endswith("weight_scale")}
    assert set(others.values()) == {dtype}
    assert any(n.endswith("q_proj.bias") for n in others)


def test_a_tied_tensor_is_stored_once(tmp_path: Path, source_folder: SourceFolder) -> None:
    source = source_folder("llama")
    model, plan = make_student(source)
    write_packed(model, plan, tmp_path / "out", str(source), None, torch.float32, {})
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_the_config_names_the_method_the_version_and_every_layer(packed: Packed) -> None:
    _, plan, source, folder = packed
    config = json.loads((folder / "config.json").read_text())
    entry = config["quantization_config"]
    assert (entry["quant_method"], entry["format_version"], entry["group_size"]) == ("kbop", 1, 4)
    assert entry["modules"] == [e.name for e in plan.binary]
    theirs = json.loads((source / "config.json").read_text())
    assert config["architectures"] == theirs["architectures"]
    assert config["rope_theta"] == theirs["rope_parameters"]["rope_theta"] == config["rope_parameters"]["rope_theta"]


def test_tokenizer_and_generation_config_come_along(tmp_path: Path, source_folder: SourceFolder) -> None:
    source, folder = source_folder("opt"), tmp_path / "out"
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 7], "max_new_tokens": 5}')
    model, plan = make_student(source)
    write_packed(model, plan, folder, str(source), None, torch.float32, {})
    ours = json.loads((folder / "generation_config.json").read_text())
    assert (ours["eos_token_id"], ours["max_new_tokens"]) == ([2, 7], 5)
    assert AutoTokenizer.from_pretrained(folder)("w3 w5").input_ids == [3, 5]


def test_the_manifest_describes_every_other_file(packed: Packed) -> None:
    folder = packed[-1]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {f["path"] for f in manifest["files"]} == {p.name for p in folder.iterdir()} - {"manifest.json"}
    assert all(f["sha256"] == sha256(folder / f["path"]) for f in manifest["files"])
    assert all(f["size"] == (folder / f["path"]).stat().st_size for f in manifest["files"])
    assert verify_packed(folder) == manifest


def test_provenance_stands_in_the_header(packed: Packed) -> None:
    with safe_open(packed[-1] / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "kbop_format_version": "1", "run": "test"}


def test_a_tokenizer_with_several_chat_templates_is_written_and_verified(
    tmp_path: Path, source_folder: SourceFolder
) -> None:
    source = source_folder("llama")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    tokenizer.save_pretrained(source)
    model, plan = make_student(source)
    write_packed(model, plan, tmp_path / "out", str(source), None, torch.float32, {})
    paths = {f["path"] for f in verify_packed(tmp_path / "out")["files"]}
    assert "additional_chat_templates/tools.jinja" in paths


def test_negative_scales_are_folded_into_the_signs(packed: Packed, tmp_path: Path) -> None:
    model, plan, source, _ = packed
    layer = binary_layers(model)["model.layers.1.mlp.down_proj"]
    with torch.no_grad():
        layer.weight_scale[::2, 1] *= -1
    write_packed(model, plan, tmp_path / "folded", str(source), None, torch.float32, {})
    verify_packed(tmp_path / "folded")
    stored = binary_layers(load_model(str(tmp_path / "folded")))["model.layers.1.mlp.down_proj"]
    assert bool((stored.weight_scale >= 0).all())
    torch.testing.assert_close(stored.dense(), layer.dense(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6, -1e6])
def test_a_scale_beyond_half_precision_is_refused_by_name(bad: float, packed: Packed, tmp_path: Path) -> None:
    model, plan, source, _ = packed
    with torch.no_grad():
        binary_layers(model)["model.layers.0.mlp.up_proj"].weight_scale[3, 0] = bad
    with pytest.raises(BadWeights, match=r"model.layers.0.mlp.up_proj: a scale is .*, beyond float16"):
        write_packed(model, plan, tmp_path / "new", str(source), None, torch.float32, {})
    assert not (tmp_path / "new").exists()


def test_writing_again_replaces_the_older_checkpoint(packed: Packed) -> None:
    model, plan, source, folder = packed
    (folder / "stale").write_text("old")
    binary_layers(model)["model.layers.0.mlp.up_proj"].weight.zero_()
    write_packed(model, plan, folder, str(source), None, torch.float32, {})
    assert not (folder / "stale").exists()
    assert not load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].any()
    verify_packed(folder)


# -- verification -----------------------------------------------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the stored tensors and make the manifest agree, so that only the format can be wrong."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["files"]:
        path = folder / entry["path"]
        entry["size"], entry["sha256"] = path.stat().st_size, sha256(path)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_rewritten_file_with_a_matching_manifest_still_verifies(packed: Packed) -> None:
    rewrite(packed[-1], lambda tensors: None)
    verify_packed(packed[-1])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "empty"])
def test_a_damaged_file_is_noticed_by_name(name: str, damage: str, packed: Packed) -> None:
    path = packed[-1] / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        middle = len(content) // 2
        changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"truncated": content[:-1], "changed": changed, "empty": b""}[damage])
    with pytest.raises(BadCheckpoint, match=f"{name} is missing or not what was written"):
        verify_packed(packed[-1])


@pytest.mark.parametrize(
    "content", [None, "", "{", "{}", "[]", '{"files": [{}]}', '{"files": [1]}', "null", '{"files": 1}']
)
def test_a_manifest_that_is_none_is_a_named_error(content: str | None, packed: Packed) -> None:
    path = packed[-1] / "manifest.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(BadCheckpoint, match="no readable manifest"):
        verify_packed(packed[-1])


LAYER = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"].int()}), "bits must be uint8"),
        (lambda t: t.update({f"{LAYER}.weight_scale": t[f"{LAYER}.weight_scale"].float()}), "scales float16"),
        (lambda t: t.update({f"{LAYER}.weight_scale": t[f"{LAYER}.weight_scale"][:-1].clone()}), "equal rows"),
        (lambda t: t[f"{LAYER}.weight_scale"].neg_(), "negative or not finite"),
        (lambda t: t[f"{LAYER}.weight_scale"].fill_(torch.nan), "negative or not finite"),
        (lambda t: t.pop(f"{LAYER}.weight_scale"), "not a packed checkpoint"),
        (lambda t: t.pop(f"{LAYER}.weight"), "not a packed checkpoint"),
    ],
)
def test_tensors_that_break_the_format_are_refused(
    change: Callable[[dict[str, Tensor]], Any], complaint: str, packed: Packed
) -> None:
    rewrite(packed[-1], change)
    with pytest.raises(BadCheckpoint, match=complaint):
        verify_packed(packed[-1])


# -- students between stages ------------------------------------------------------------------------------------------


def test_a_saved_student_comes_back_bit_for_bit(tmp_path: Path, source_folder: SourceFolder) -> None:
    source = source_folder("llama")
    (model, _), (other, _) = make_student(source), make_student(source)
    with torch.no_grad():
        for layer in binary_layers(model).values():
            layer.weight.bitwise_not_()
            layer.weight_scale.mul_(1.25)
        model.model.norm.weight.add_(1.0)
    save_student(model, tmp_path / "student.safetensors")
    load_student(other, tmp_path / "student.safetensors")
    pairs = zip([*model.parameters(), *model.buffers()], [*other.parameters(), *other.buffers()], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_student_of_another_model_is_refused(tmp_path: Path, source_folder: SourceFolder) -> None:
    model, _ = make_student(source_folder("qwen2"))
    other, _ = make_student(source_folder("gpt2"))
    save_student(model, tmp_path / "student.safetensors")
    with pytest.raises(BadCheckpoint, match="holds other tensors than this model has"):
        load_student(other, tmp_path / "student.safetensors")


@pytest.mark.parametrize("content", [None, b"", b"garbage" * 100])
def test_a_student_that_cannot_be_read_is_a_named_error(
    content: bytes | None, tmp_path: Path, source_folder: SourceFolder
) -> None:
    model, _ = make_student(source_folder("gpt2"))
    if content is not None:
        (tmp_path / "student.safetensors").write_bytes(content)
    with pytest.raises(BadCheckpoint, match=r"student.safetensors cannot be read"):
        load_student(model, tmp_path / "student.safetensors")


# -- a full disk ------------------------------------------------------------------------------------------------------

NO_SPACE = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        *((error, True) for error in NO_SPACE),
        (OSError(errno.EFBIG, "File too large"), True),
        (
            RuntimeError("[enforce fail at inline_container.cc:664] PytorchStreamWriter failed writing file data/0"),
            True,
        ),
        (OSError(errno.EACCES, "Permission denied"), False),
        (SafetensorError("incomplete metadata"), False),
        (RuntimeError("CUDA out of memory"), False),
        (ValueError("No space left on device"), False),
    ],
)
def test_only_a_full_disk_counts_as_one(error: Exception, full: bool) -> None:
    assert checkpoint.is_disk_full(error) == full


def failing(error: Exception) -> Callable[..., NoReturn]:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise error

    return fail


@pytest.mark.parametrize("error", NO_SPACE, ids=["space", "quota", "safetensors"])
@pytest.mark.parametrize("place", ["save_file", "save_metadata", "sync"])
def test_a_full_disk_leaves_no_packed_checkpoint_and_no_temporary_one(
    error: Exception, place: str, packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plan, source, folder = packed
    shutil.rmtree(folder)
    monkeypatch.setattr(checkpoint, place, failing(error))
    with pytest.raises(DiskFull, match="no space left while writing out") as caught:
        write_packed(model, plan, folder, str(source), None, torch.float32, {})
    assert caught.value.retryable
    assert sorted(p.name for p in tmp_path.iterdir()) == ["qwen2-source"]


@pytest.mark.parametrize("error", NO_SPACE, ids=["space", "quota", "safetensors"])
def test_a_full_disk_keeps_the_older_file(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors({"x": torch.ones(3)}, path)
    monkeypatch.setattr(checkpoint, "save_file", failing(error))
    with pytest.raises(DiskFull, match=r"no space left while writing a.safetensors"):
        save_tensors({"x": torch.zeros(3)}, path)
    assert load_file(path)["x"].tolist() == [1.0] * 3
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_json_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "a.json", {"n": 1})
    monkeypatch.setattr(checkpoint.os, "fsync", failing(NO_SPACE[0]))
    with pytest.raises(DiskFull):
        write_json(tmp_path / "a.json", {"n": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_other_errors_of_the_system_keep_their_type_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "save_file", failing(PermissionError(errno.EACCES, "no")))
    with pytest.raises(PermissionError):
        save_tensors({"x": torch.ones(3)}, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []
