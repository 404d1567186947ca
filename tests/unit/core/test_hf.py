"""Packed checkpoints through transformers: loading, saving again, going back to dense, and failing loudly."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import kbop_core
from kbop_core.checkpoint import write_packed
from kbop_core.convert import binary_layers, convert_plain, plan_conversion
from kbop_core.errors import BadCheckpoint, ModelError
from kbop_core.hf import context_length, generate, load_model, load_tokenizer, source_dtype

FAMILIES = ["llama", "qwen2", "opt", "gpt2", "gpt_neox"]
Pack = Callable[[str], tuple[PreTrainedModel, Path]]


@pytest.fixture
def pack(tmp_path: Path, source_folder: Callable[[str], Path]) -> Pack:
    """Family → student in memory whose scales are exact in float16, and its packed folder."""

    def make(family: str) -> tuple[PreTrainedModel, Path]:
        source, folder = source_folder(family), tmp_path / f"{family}-packed"
        model = load_model(str(source))
        plan = plan_conversion(model, 4)
        with torch.no_grad():
            for layer in convert_plain(model, plan, trainable=True).values():
                layer.weight_scale.copy_(layer.weight_scale.half())
        write_packed(model, plan, folder, str(source), None, torch.float32, {})
        return model, folder

    return make


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_checkpoint_computes_what_the_student_did(family: str, pack: Pack, token_ids: Tensor) -> None:
    student, folder = pack(family)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert binary_layers(loaded).keys() == binary_layers(student).keys()
    assert torch.equal(logits(loaded.eval(), token_ids), logits(student, token_ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_a_loaded_checkpoint_and_loading_it_again_changes_nothing(
    family: str, pack: Pack, tmp_path: Path, token_ids: Tensor
) -> None:
    student, folder = pack(family)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(logits(again, token_ids), logits(student, token_ids))
    stored, first = (load_file(f / "model.safetensors") for f in (tmp_path / "again", folder))
    assert all(torch.equal(stored[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_stay_bytes_and_scales_stay_half_whatever_dtype_is_asked_for(dtype: torch.dtype, pack: Pack) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(pack("qwen2")[1], dtype=dtype)
    for layer in binary_layers(loaded).values():
        assert (layer.weight.dtype, layer.weight_scale.dtype) == (torch.uint8, torch.float16)
    assert loaded.model.embed_tokens.weight.dtype == dtype


@pytest.mark.parametrize("family", FAMILIES)
def test_dequantize_gives_ordinary_layers_with_the_same_values(family: str, pack: Pack, token_ids: Tensor) -> None:
    student, folder = pack(family)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    loaded.dequantize()
    kind = Conv1D if family == "gpt2" else nn.Linear
    assert all(type(loaded.get_submodule(name)) is kind for name in binary_layers(student))
    torch.testing.assert_close(logits(loaded, token_ids), logits(student, token_ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dequantized_model_is_a_plain_checkpoint_for_anyone(
    family: str, pack: Pack, tmp_path: Path, token_ids: Tensor
) -> None:
    student, folder = pack(family)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    loaded.dequantize()
    loaded.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(logits(dense, token_ids), logits(student, token_ids), rtol=1e-5, atol=1e-5)


def test_a_model_may_be_saved_first_and_dequantized_after(pack: Pack, tmp_path: Path, token_ids: Tensor) -> None:
    student, folder = pack("llama")
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    loaded.save_pretrained(tmp_path / "again")
    loaded.dequantize()
    torch.testing.assert_close(logits(loaded, token_ids), logits(student, token_ids), rtol=1e-5, atol=1e-5)


def test_a_tied_head_is_tied_again_after_loading(pack: Pack) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(pack("llama")[1])
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_registering_twice_does_nothing() -> None:
    kbop_core.register()
    kbop_core.register()


def test_a_process_without_the_plugin_fails_loudly(pack: Pack) -> None:
    _, folder = pack("llama")
    script = (
        "import sys; from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert done.returncode != 0
    assert "q_proj.weight" in done.stderr
    assert "MISMATCH" in done.stderr


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_an_unknown_format_version_is_a_named_error(version: object, pack: Pack) -> None:
    _, folder = pack("gpt2")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = version
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadCheckpoint, match=f"packed format version {version}; this code reads 1"):
        load_model(str(folder))


def test_a_cut_off_weights_file_is_a_named_error(pack: Pack) -> None:
    _, folder = pack("gpt2")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelError, match="cannot load"):
        load_model(str(folder))


def test_an_unquantized_model_cannot_be_loaded_as_packed(source_folder: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="require the model to be pre-quantized"):
        AutoModelForCausalLM.from_pretrained(source_folder("gpt2"), quantization_config=kbop_core.hf.KbopConfig())


def test_a_loaded_teacher_is_in_eval_mode_without_gradients(source_folder: Callable[[str], Path]) -> None:
    model = load_model(str(source_folder("llama")), dtype=torch.bfloat16)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_pickled_weights_are_refused(source_folder: Callable[[str], Path]) -> None:
    folder = source_folder("gpt2")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot load"):
        load_model(str(folder))


def test_code_in_a_model_folder_is_never_run(source_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder, trap = source_folder("gpt2"), tmp_path / "it-ran"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(trap)!r}, 'w')")
    with pytest.raises(ModelError, match="cannot load"):
        load_model(str(folder))
    assert not trap.exists()


@pytest.mark.parametrize("what", ["no folder", "no config", "broken config", "no weights"])
def test_a_folder_that_is_no_model_is_a_named_error(what: str, source_folder: Callable[[str], Path]) -> None:
    folder = source_folder("gpt2")
    if what == "no folder":
        shutil.rmtree(folder)
    if what == "no config":
        (folder / "config.json").unlink()
    if what == "broken config":
        (folder / "config.json").write_text("{")
    if what == "no weights":
        (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot load"):
        load_model(str(folder))


def test_a_model_without_tokenizer_is_a_named_error(source_folder: Callable[[str], Path]) -> None:
    folder = source_folder("llama")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="no tokenizer at"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("most", "expected"), [(2048, 32), (16, 16)])
def test_the_context_is_the_models_own_up_to_a_limit(
    family: str, most: int, expected: int, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    assert context_length(tiny_model(family), most) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_source_dtype_is_that_of_the_files_however_the_model_was_loaded(
    dtype: torch.dtype, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    tiny_model("llama").to(dtype).save_pretrained(tmp_path / "m")
    assert source_dtype(load_model(str(tmp_path / "m")), str(tmp_path / "m")) == dtype


def test_generation_is_greedy_and_includes_the_prompt(pack: Pack) -> None:
    student, folder = pack("llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = {generate(load_model(str(folder)), tokenizer, "w5 w7", 6) for _ in range(2)}
    assert len(texts) == 1
    text = texts.pop()
    assert text.startswith("w5 w7")
    ids = tokenizer("w5 w7", return_tensors="pt").input_ids
    assert text.split()[2] == f"w{int(logits(student, ids)[0, -1].argmax())}"
