"""Models whose blocks stay on disk: same numbers, one block in memory at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from kbop_core.convert import binary_layers, check_finite, convert_plain, plan_conversion
from kbop_core.errors import BadWeights, ModelError, UnsupportedModel
from kbop_core.hf import load_lazily, load_model
from kbop_core.init.blockwise import BlockEffort
from kbop_core.init.pretrained import InitEffort, pretrained_init
from kbop_core.init.stream import BlockStream
from kbop_core.lazy import blocks_on_disk, keep, resident

MakeModel = Callable[[str], PreTrainedModel]
CPU = torch.device("cpu")


@pytest.fixture(params=["llama", "qwen2", "gpt2", "opt", "gpt_neox"])
def folder(request: pytest.FixtureRequest, tiny_model: MakeModel, tmp_path: Path) -> Path:
    """A checkpoint of several shards with an index."""
    tiny_model(request.param).save_pretrained(tmp_path, max_shard_size="6KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    return tmp_path


def on_disk(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.is_meta}


def test_a_lazy_model_computes_the_same_and_keeps_no_block(folder: Path, token_ids: Tensor) -> None:
    whole, lazy = load_model(str(folder)), load_lazily(str(folder), None, torch.float32, CPU)
    blocks = plan_conversion(whole, 4).blocks
    assert plan_conversion(lazy, 4) == plan_conversion(whole, 4)
    inside = {n for n, _ in whole.named_parameters() if any(n.startswith(b + ".") for b in blocks)}
    assert on_disk(lazy) == inside and blocks_on_disk(lazy) == blocks and not blocks_on_disk(whole)
    in_memory: list[int] = []
    for block in blocks:
        lazy.get_submodule(block).register_forward_hook(lambda *_: in_memory.append(len(inside - on_disk(lazy))))
    with torch.no_grad():
        assert torch.equal(lazy(input_ids=token_ids).logits, whole(input_ids=token_ids).logits)
    assert len(in_memory) == len(blocks) and max(in_memory) <= -(-len(inside) // len(blocks))
    assert on_disk(lazy) == inside


def test_a_block_is_held_while_someone_holds_it_and_for_good_when_kept(folder: Path, token_ids: Tensor) -> None:
    lazy = load_lazily(str(folder), None, torch.float32, CPU)
    first, second = plan_conversion(lazy, 4).blocks
    with resident(lazy, first):
        with resident(lazy, first):
            pass
        lazy(input_ids=token_ids)
        assert not on_disk(lazy.get_submodule(first)) and on_disk(lazy.get_submodule(second))
    assert on_disk(lazy.get_submodule(first))
    keep(lazy, first)
    with torch.no_grad():
        next(lazy.get_submodule(first).parameters()).zero_()
        before = lazy(input_ids=token_ids).logits
        assert torch.equal(lazy(input_ids=token_ids).logits, before), "a kept block is not read again"
    keep(lazy, second)
    assert not blocks_on_disk(lazy)


def test_a_student_made_block_by_block_from_disk_is_the_same(folder: Path, token_ids: Tensor) -> None:
    """Its own blocks are kept as they become binary; the teacher's are gone again."""
    made = []
    for load in (load_model, lambda place: load_lazily(place, None, torch.float32, CPU)):
        student, teacher = load(str(folder)), load(str(folder))
        effort = InitEffort(blockwise=BlockEffort(4))
        pretrained_init(student, teacher, plan_conversion(student, 4), [token_ids], effort)
        made.append((student, teacher))
    (student, _), (ours, teacher) = made
    assert not blocks_on_disk(ours) and len(blocks_on_disk(teacher)) == 2
    for name, layer in binary_layers(student).items():
        assert torch.equal(ours.get_submodule(name).weight, layer.weight)
        assert torch.equal(ours.get_submodule(name).weight_scale, layer.weight_scale)
    assert torch.equal(ours(input_ids=token_ids).logits, student(input_ids=token_ids).logits)


def test_plain_binarization_and_the_check_for_nan_visit_one_block_after_the_other(folder: Path) -> None:
    whole, lazy = load_model(str(folder)), load_lazily(str(folder), None, torch.float32, CPU)
    check_finite(lazy)
    plan = plan_conversion(whole, 4)
    ours, theirs = (convert_plain(model, plan, trainable=True) for model in (lazy, whole))
    assert not on_disk(lazy) and all(torch.equal(ours[n].dense(), theirs[n].dense()) for n in ours)


def test_nan_in_a_block_on_disk_is_found(tiny_model: MakeModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(BadWeights, match=r"NaN or infinity in 1 tensors.*layers\.1\.mlp\.up_proj"):
        check_finite(load_lazily(str(tmp_path), None, torch.float32, CPU))


def test_missing_and_misshapen_tensors_are_named(tiny_model: MakeModel, tmp_path: Path, token_ids: Tensor) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    path, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(path)
    save_file({n: t for n, t in tensors.items() if n != name}, path, {"format": "pt"})
    with pytest.raises(BadWeights, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"), torch.no_grad():
        load_lazily(str(tmp_path), None, torch.float32, CPU)(input_ids=token_ids)
    save_file(tensors | {name: torch.zeros(3, 3)}, path, {"format": "pt"})
    with pytest.raises(BadWeights, match=r"is \(3, 3\) in the checkpoint"), torch.no_grad():
        load_lazily(str(tmp_path), None, torch.float32, CPU)(input_ids=token_ids)


def test_without_readable_safetensors_nothing_is_loaded(tiny_model: MakeModel, tmp_path: Path) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path)
    with pytest.raises(BadWeights, match="no readable safetensors"):
        load_lazily(str(tmp_path), None, torch.float32, CPU)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": 3}))
    with pytest.raises(BadWeights, match="no readable safetensors"):
        load_lazily(str(tmp_path), None, torch.float32, CPU)
    with pytest.raises(ModelError, match="cannot load"):
        load_lazily(str(tmp_path / "nowhere"), None, torch.float32, CPU)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_file_is_named_and_the_block_is_as_before(damage: str, folder: Path, token_ids: Tensor) -> None:
    lazy = load_lazily(str(folder), None, torch.float32, CPU)
    first = blocks_on_disk(lazy)[0]
    before = on_disk(lazy)
    weights = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shard = folder / next(file for name, file in weights.items() if first in f"{lazy.base_model_prefix}.{name}")
    whole = shard.read_bytes()
    shard.unlink()
    if damage == "cut":
        shard.write_bytes(whole[: len(whole) // 2])
    for _ in range(2):
        with pytest.raises(BadWeights, match=rf"{shard.name}: not readable"), torch.no_grad():
            lazy(input_ids=token_ids)
        assert on_disk(lazy) == before
    shard.write_bytes(whole)
    with torch.no_grad():
        assert torch.equal(lazy(input_ids=token_ids).logits, load_model(str(folder))(input_ids=token_ids).logits)


def test_files_in_another_form_are_refused(tiny_model: MakeModel, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, path, {"format": "pt"})
    with pytest.raises(BadWeights, match=rf"{name} is stored as torch.float8_e4m3fn"), torch.no_grad():
        load_lazily(str(tmp_path), None, torch.float32, CPU)(input_ids=torch.arange(4)[None])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UnsupportedModel, match="in another form"):
        load_lazily(str(tmp_path), None, torch.float32, CPU)


def test_experts_that_are_stacked_while_loading_are_refused_with_what_to_do(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=32, num_key_value_heads=1, num_local_experts=2, **sizes)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="in another form") as caught:
        load_lazily(str(tmp_path), None, torch.float32, CPU)
    assert "none" in caught.value.hint


def test_a_walk_reads_a_later_block_only_when_it_gets_there(folder: Path, token_ids: Tensor) -> None:
    lazy = load_lazily(str(folder), None, torch.float32, CPU)
    first, second = blocks_on_disk(lazy)
    read: list[str] = []
    fill = lazy._kbop_lazy_blocks.weights.fill
    lazy._kbop_lazy_blocks.weights.fill = lambda module, name: (read.append(name), fill(module, name))
    stream = BlockStream(lazy, (first, second), token_ids)
    assert read == [first]
    stream.advance(lazy, first)
    stream.advance(lazy, second)
    assert read == [first, first, second]


def test_a_nan_outside_the_blocks_is_counted_once(folder: Path) -> None:
    lazy = load_lazily(str(folder), None, torch.float32, CPU)
    next(p for p in lazy.parameters() if not p.is_meta).view(-1)[0] = torch.nan
    with pytest.raises(BadWeights, match="NaN or infinity in 1 tensors"):
        check_finite(lazy)


#: Binarizes a checkpoint, compares it with its teacher on one window, and tells its peak memory beyond the imports'.
PEAK = """
import sys
from pathlib import Path
import torch
from transformers import LlamaForCausalLM
from kbop_core.convert import convert_plain, plan_conversion
from kbop_core.hf import load_lazily, load_model

def peak():  # of this image: getrusage's ru_maxrss is also the parent's before exec, which may be larger
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])

cpu, before = torch.device("cpu"), peak()
load = {"lazy": lambda p: load_lazily(p, None, torch.float32, cpu), "whole": load_model}[sys.argv[2]]
teacher, student = load(sys.argv[1]), load(sys.argv[1])
convert_plain(student, plan_conversion(teacher, 128), trainable=True)
with torch.no_grad():
    student(input_ids=torch.arange(16)[None]), teacher(input_ids=torch.arange(16)[None])
print(peak() - before)
"""


def test_binarizing_from_disk_needs_a_fraction_of_the_models_memory(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8
    )
    model = LlamaForCausalLM(config)
    size = 4 * sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path)
    del model

    # what is freed goes back to the system, as it does by itself for tensors of real models' size
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}

    def peak(kind: str) -> int:
        command = [sys.executable, "-c", PEAK, str(tmp_path), kind]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=environment)
        return int(done.stdout.split()[-1])

    lazy, whole = peak("lazy"), peak("whole")
    assert lazy < 0.5 * size and whole - lazy > 0.7 * size > 130 * 2**20
