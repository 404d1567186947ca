"""Bytes of a rank: each formula beside the tensors that the code really holds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from jobs import tensor_sizes
from jobs.errors import BadPlan
from jobs.memory_plan import MemoryPlan
from jobs.model_shape import shape_of_config
from jobs.plan_request import PlanRequest, deal_windows
from jobs.stages import teacher as stages_teacher
from jobs.tensor_sizes import activation_bytes, cached_token_bytes, final_norm_bytes
from kbop_core import distill, engine, moments, reversals, selection, target_cache, training_state
from kbop_core.convert import binary_layers, convert_plain, plan_conversion
from kbop_core.distill import distillation_loss, top_k_loss, top_targets
from kbop_core.kbop import KBOP
from kbop_core.loop import layout_steps
from kbop_core.schedules import FlipSchedule
from kbop_core.shard import Gang
from kbop_core.teacher import LiveTeacher
from tests.unit.jobs.live_bytes import allocated_by, made_by

LLAMA = {
    "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen3": LLAMA | {"head_dim": 16},
    "gpt2": {"n_embd": 48, "n_head": 4, "vocab_size": 100, "n_positions": 64},
    "opt": {
        "hidden_size": 48, "ffn_dim": 96, "num_attention_heads": 4, "vocab_size": 100, "max_position_embeddings": 64,
        "word_embed_proj_dim": 48,
    },
}  # fmt: skip
BATCH, CONTEXT = 2, 16


def config_of(family: str, blocks: int) -> dict[str, Any]:
    depth = "n_layer" if family == "gpt2" else "num_hidden_layers"
    return FAMILIES[family] | {"model_type": family, depth: blocks}


def student(family: str, blocks: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    settings = {k: v for k, v in config_of(family, blocks).items() if k != "model_type"}
    config = AutoConfig.for_model(family, **settings, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    convert_plain(model, plan_conversion(model, 16), trainable=True)
    return model.to(dtype).requires_grad_(True)


def plan(family: str = "llama", **request: Any) -> MemoryPlan:
    defaults = {"device": "cpu", "micro_batch": BATCH, "context": CONTEXT, "group_size": 16}
    return MemoryPlan(shape_of_config(config_of(family, 2), "x"), PlanRequest(**defaults | request))


def kept_bytes(model: PreTrainedModel) -> int:
    """Bytes that a forward pass up to the last hidden state and the head keeps, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}
    ids = torch.randint(3, 100, (BATCH, CONTEXT))

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda t: t):
        logits = model(input_ids=ids, use_cache=False).logits
    assert logits.requires_grad
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_keeps_the_activations_that_the_plan_counts(family: str, dtype: torch.dtype) -> None:
    one, two = (kept_bytes(student(family, blocks, dtype)) for blocks in (1, 2))
    counted = BATCH * CONTEXT * activation_bytes(shape_of_config(config_of(family, 1), "x"), dtype.itemsize)
    assert counted == pytest.approx(two - one, rel=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_block_and_the_last_norm_are_all_that_a_model_of_one_block_keeps(family: str) -> None:
    shape = shape_of_config(config_of(family, 1), "x")
    counted = BATCH * CONTEXT * (activation_bytes(shape, 4) + final_norm_bytes(shape, 4))
    rotary = CONTEXT * 2 * shape.head_dim * 4 if shape.family == "llama" else 0
    assert kept_bytes(student(family, 1)) == pytest.approx(counted + rotary, rel=0.01)


@pytest.mark.parametrize("evidence", ["bfloat16", "int8"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_bits_evidence_and_moments_are_those_that_kbop_holds(evidence: Any, ranks: int) -> None:
    layers = binary_layers(student("llama", 2))
    optimizer = KBOP(layers, FlipSchedule(0.01, 9, 1), gang=Gang(0, ranks), evidence=evidence)
    planned = plan(ranks=ranks, evidence=evidence)
    shards = optimizer.shards.values()
    assert planned.bits == sum(la.weight.nbytes for la in layers.values())
    assert planned.evidence == sum(t.nbytes for s in shards for t in s.evidence.tensors().values())
    held = [(m.row, m.column, m.row_sketch, m.column_sketch) for m in (s.moments for s in shards)]
    assert planned.moments == sum(t.nbytes for group in held for t in group) + optimizer._probes.nbytes
    assert planned.first_signs == sum(s.reversals.start.nbytes for s in shards)


def test_numbers_that_the_core_fixes_are_the_cores() -> None:
    sizes = tensor_sizes
    assert (sizes.PROBES, sizes.SAMPLED_ROWS) == (moments.PROBES, reversals.SAMPLE)
    assert (sizes.KL_CHUNK, sizes.ZERO_BUCKET) == (distill.CHUNK, engine.BUCKET)
    assert (sizes.COUNTS, sizes.CACHE_TOP) == (selection.BASE, target_cache.TOP)
    assert sizes.CHECKPOINTS == training_state.KEEP + 1
    assert (sizes.TARGET_LOGITS, sizes.TARGET_WINDOWS) == (stages_teacher.BATCH_LOGITS, target_cache.PART)
    assert sizes.TARGET_COPIES == stages_teacher.LOGITS_ARRAYS


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_copy_of_a_checkpoint_is_a_ranks_state_without_its_sketches(ranks: int) -> None:
    layers = binary_layers(student("llama", 2))
    optimizer = KBOP(layers, FlipSchedule(0.01, 9, 1), gang=Gang(0, ranks))
    planned = plan(ranks=ranks)
    signs = sum(piece.rows.nbytes for piece in optimizer.state().values())
    assert planned.snapshot - 12 * -(-planned.real // ranks) == pytest.approx(signs, rel=0.01)


@pytest.mark.parametrize("teacher", ["resident", "offloaded", "sharded", "cached"])
def test_the_student_is_made_one_block_at_a_time(teacher: Any) -> None:
    made = plan(teacher=teacher, ranks=2, device="cuda").making[-1].parts
    dense = 2 * plan().binary_weights
    assert made["block"] - 8 * plan().largest.weights == dense / 2 and made["student"] < dense


@pytest.mark.parametrize("family", FAMILIES)
def test_full_precision_parameters_are_those_of_the_converted_model(family: str) -> None:
    assert plan(family).real == sum(p.numel() for p in student(family, 2).parameters())


@pytest.mark.parametrize(
    ("stage", "device", "parameters", "optimizer", "at_step"),
    [(0, "cpu", 4, 8, 4), (0, "cuda", 2, 12, 2), (1, "cuda", 2, 12 / 4, 2), (2, "cuda", 2, 12 / 4, 2 / 4)],
)
def test_zero_stages_shard_the_optimizer_then_the_gradients(
    stage: int, device: Any, parameters: float, optimizer: float, at_step: float
) -> None:
    planned = plan(zero_stage=stage, device=device, ranks=4)
    flips = next(phase for phase in planned.phases if phase.name == "flips")
    assert planned.parameters == parameters * planned.real
    assert planned.optimizer == pytest.approx(optimizer * planned.real, rel=0.001)
    assert flips.parts["gradients"] == pytest.approx(at_step * planned.real, rel=0.001)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_loss_holds_as_many_copies_of_the_logits_as_planned(dtype: torch.dtype) -> None:
    student_BTV, teacher_BTV = (torch.randn(2, 8, 500).to(dtype) for _ in range(2))
    logits = student_BTV.requires_grad_()
    made = made_by(lambda: distillation_loss(logits, teacher_BTV).backward())
    planned = loss_plan("resident", dtype)
    assert made + student_BTV.nbytes + teacher_BTV.nbytes == pytest.approx(planned, rel=0.01)


@pytest.mark.parametrize("chunk", [500, 1700, 2**24])
def test_the_loss_works_on_pieces_as_large_as_planned(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "CHUNK", chunk)
    monkeypatch.setattr("jobs.memory_plan.KL_CHUNK", chunk)
    logits = torch.randn(16, 500, requires_grad=True)
    made = made_by(lambda: distillation_loss(logits, torch.randn(16, 500)))
    assert made + logits.nbytes == pytest.approx(loss_plan("resident", torch.float32), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("chunk", [2000, 6000, 2**24])
def test_the_loss_of_a_cached_teacher_works_on_pieces_as_large_as_planned(
    chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill, "CHUNK", chunk)
    monkeypatch.setattr("jobs.memory_plan.KL_CHUNK", chunk)
    logits = torch.randn(1, 16, 2000).to(dtype).requires_grad_()
    targets = top_targets(torch.randn(1, 16, 2000).log_softmax(-1), 64)
    made = allocated_by(lambda: top_k_loss(logits, targets))
    held = logits.nbytes + targets.ids_BTK.nbytes + targets.log_p_BTK.nbytes
    assert made + held == pytest.approx(loss_plan("cached", dtype, 2000), rel=0.05)


@pytest.mark.parametrize("windows", [1, 3])
def test_a_cached_teachers_targets_are_written_with_the_bytes_planned(
    windows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.memory_plan.TARGET_LOGITS", windows * 64 * 2000)
    shape = shape_of_config(config_of("llama", 1) | {"vocab_size": 2000}, "x")
    planned = MemoryPlan(shape, PlanRequest(device="cpu", context=64, group_size=16, teacher="cached"))
    cache = target_cache.TargetCache(tmp_path, range(64))

    def write() -> None:
        rows, teacher = (lambda numbers: torch.zeros(len(numbers), 64)), LiveTeacher(RandomLogits(2000))
        cache.write(Gang(), rows, teacher.log_probs, windows)

    assert allocated_by(write) == pytest.approx(planned.targets_from_memory.parts["teacher_run"], rel=0.1)


class RandomLogits:
    """A model that needs nothing but its logits."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def __call__(self, input_ids: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=torch.randn(*input_ids.shape, self.vocabulary))


def loss_plan(teacher: Any, dtype: torch.dtype, words: int = 500) -> int:
    """Bytes planned for the loss of 16 tokens."""
    device: Any = "cpu" if dtype == torch.float32 else "cuda"
    shape = shape_of_config(config_of("llama", 1) | {"vocab_size": words}, "x")
    return MemoryPlan(shape, PlanRequest(device=device, context=16, group_size=16, teacher=teacher))._loss


@pytest.mark.parametrize(("dtype", "device"), [(torch.float32, "cpu"), (torch.bfloat16, "cuda")])
@pytest.mark.parametrize("evidence", ["bfloat16", "int8"])
def test_backward_through_a_layer_holds_what_is_planned(evidence: Any, dtype: torch.dtype, device: Any) -> None:
    layers = binary_layers(student("llama", 1, dtype))
    planned = plan(evidence=evidence, device=device)
    layer = layers[planned.largest.name]
    made_here = KBOP(layers, FlipSchedule(0.01, 9, 1), evidence=evidence)
    for one in made_here.shards.values():  # a step is under way: there are projections
        one.moments.project(torch.zeros(len(one.moments.row), one.moments.width), made_here._probes)
    y = layer(torch.randn(BATCH, CONTEXT, layer.in_features, dtype=dtype, requires_grad=True))
    counted = allocated_by if device == "cpu" else made_by
    made = counted(lambda: y.backward(torch.ones_like(y)))
    assert made == pytest.approx(planned._layer_backward, rel=0.02)


@pytest.mark.parametrize("rate", [0.0, 0.004, 0.5])
def test_candidates_are_those_of_the_peak_rate(rate: float) -> None:
    planned, schedule = plan(flip_rate=rate), FlipSchedule(rate, 1000, 10)
    most = max(sum(schedule.count(step, la.weights) + 1 for la in planned.binary) for step in range(8, 30))
    assert planned.candidates == pytest.approx(most, abs=len(planned.binary))


@pytest.mark.parametrize("batch_tokens", [1, 1000, 2048, 40_000])
@pytest.mark.parametrize("context", [7, 256, 2048])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_windows_are_dealt_as_training_deals_them(batch_tokens: int, context: int, ranks: int) -> None:
    layout = layout_steps(batch_tokens, context, ranks, 8)
    assert deal_windows(batch_tokens, context, ranks, 8) == (layout.micro_batch, layout.micro_steps)


def test_a_cached_position_takes_258_bytes_with_two_byte_ids_and_386_with_four() -> None:
    assert (cached_token_bytes(65_536), cached_token_bytes(65_537)) == (258, 386)


def test_checkpointing_keeps_block_inputs_and_one_block() -> None:
    planned = plan(activation_checkpointing=True)
    n, backward = BATCH * CONTEXT, next(p for p in planned.phases if p.name == "backward")
    one = n * activation_bytes(planned.shape, 4)
    inputs = 2 * n * 48 * 4 + n * final_norm_bytes(planned.shape, 4)
    assert backward.parts["activations"] == inputs + one


def test_the_peak_is_the_largest_moment_and_its_parts_add_up() -> None:
    planned = plan()
    assert planned.peak.bytes == max(sum(p.parts.values()) for p in planned.phases)
    assert planned.peak.parts[planned.peak.largest] == max(planned.peak.parts.values())


@pytest.mark.parametrize(
    ("field", "value"),
    [("ranks", 0), ("micro_batch", -1), ("context", 0), ("zero_stage", 4), ("flip_rate", 0.6), ("teacher", "moon")],
)
def test_impossible_requests_are_refused_by_field(field: str, value: Any) -> None:
    with pytest.raises(BadPlan, match=field):
        PlanRequest(**{field: value})


def test_one_rank_has_nobody_to_share_a_teacher_with() -> None:
    with pytest.raises(BadPlan, match="sharded"):
        PlanRequest(teacher="sharded")


def test_keeping_every_layer_leaves_nothing_to_plan() -> None:
    with pytest.raises(BadPlan, match="keep"):
        _ = plan(keep=("*",)).binary
