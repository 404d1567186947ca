"""Block-wise reconstruction: what it improves, what it leaves alone, and what it puts back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kbop_core.convert import binary_layers, plan_conversion
from kbop_core.init.blockwise import BlockEffort, reconstruct_block
from kbop_core.init.pretrained import InitEffort, pretrained_init
from kbop_core.layers import BinaryLayer, BinaryLinear
from kbop_core.shard import Gang

MakeModel = Callable[[str], PreTrainedModel]
EFFORT = BlockEffort(40)


def distance(model: nn.Module, dense: nn.Module, ids: Tensor) -> float:
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids, output_hidden_states=True).hidden_states[-2] for m in (model, dense))
    return float((ours - theirs).square().mean() / theirs.square().mean())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt", "gpt_neox"])
def test_hidden_states_come_closer_to_the_teachers(family: str, tiny_model: MakeModel, token_ids: Tensor) -> None:
    dense, fitted, trained = (tiny_model(family) for _ in range(3))
    plan = plan_conversion(dense, 4)
    assert pretrained_init(fitted, dense, plan, [token_ids]) == {}
    errors = pretrained_init(trained, dense, plan, [token_ids], InitEffort(blockwise=EFFORT))
    assert list(errors) == list(plan.blocks)
    assert all(error is not None and 0.0 < error < 1.0 for error in errors.values())
    assert distance(trained, dense, token_ids) < 0.9 * distance(fitted, dense, token_ids)


def test_it_moves_signs_scales_and_norms_of_blocks_and_nothing_else(tiny_model: MakeModel, token_ids: Tensor) -> None:
    dense, fitted, trained = (tiny_model("llama") for _ in range(3))
    plan = plan_conversion(dense, 4)
    pretrained_init(fitted, dense, plan, [token_ids])
    pretrained_init(trained, dense, plan, [token_ids], InitEffort(blockwise=EFFORT))
    before, after = fitted.state_dict(), trained.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {n for n in before if ".layers." in n and (n.endswith("weight_scale") or "norm" in n)}
    old, new = binary_layers(fitted), binary_layers(trained)
    assert all(not torch.equal(old[name].weight, new[name].weight) for name in old)
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), tiny_model("llama").parameters(), strict=True))


def test_it_leaves_no_sink_no_gradient_and_the_blocks_own_dtype(tiny_model: MakeModel, token_ids: Tensor) -> None:
    dense, model = (tiny_model("llama").bfloat16() for _ in range(2))
    pretrained_init(model, dense, plan_conversion(dense, 4), [token_ids], InitEffort(blockwise=BlockEffort(2)))
    assert all(layer.gradient_sink is None for layer in binary_layers(model).values())
    assert all(p.grad is None for p in model.parameters())
    others = [p for n, p in model.named_parameters() if not n.endswith("weight_scale")]
    assert {p.dtype for p in others} == {torch.bfloat16}


def test_it_is_told_how_far_it_is_over_layers_and_steps(tiny_model: MakeModel, token_ids: Tensor) -> None:
    model, told = tiny_model("llama"), list[tuple[int, int]]()
    effort = InitEffort(blockwise=BlockEffort(3))
    tell = lambda *place: told.append(place)  # noqa: E731
    pretrained_init(model, tiny_model("llama"), plan_conversion(model, 4), [token_ids], effort, progress=tell)
    assert told == [(i + 1, 14 + 2 * 3) for i in range(20)]


class _Router(nn.Module):
    """A block with two experts, of which a call uses one: which, by the sign of its input's sum."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([BinaryLinear(8, 8, False, 8, trainable=True) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.experts[int(x.sum() > 0)](x)
        return y


def test_a_block_whose_layers_are_not_all_reached_by_each_call_stays_as_it_is() -> None:
    block, x = _Router(), torch.ones(2, 3, 8)
    layers: dict[str, BinaryLayer] = {f"experts.{i}": layer for i, layer in enumerate(block.experts)}  # type: ignore[misc]
    before = {name: tensor.clone() for name, tensor in block.named_parameters()}
    calls = [(((value,), {}), ((value,), {})) for value in (x, -x)]
    assert reconstruct_block(block, layers, nn.Identity(), calls, EFFORT, Gang(), lambda steps: None) is None
    assert all(torch.equal(before[name], tensor) for name, tensor in block.named_parameters())


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"flip_rate": 0.6},
        {"scale_lr": -1e-3},
        {"other_lr": float("nan")},
        {"clip": -1.0},
        {"warmup": 2.0},
    ],
)
def test_an_effort_out_of_range_is_refused_with_the_legal_one(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*; legal: .* … "):
        BlockEffort(**wrong)  # type: ignore[arg-type]


class _WithKept(nn.Module):
    """A binary layer, a real one that stays, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.binary, self.kept = BinaryLinear(8, 8, False, 8, trainable=True), nn.Linear(8, 8).bfloat16()
        self.register_buffer("shift", torch.full((8,), 0.1, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.kept(self.binary(x) + self.shift)
        return y


def test_real_matrices_and_buffers_stay_as_they_were() -> None:
    torch.manual_seed(0)
    block, teacher, x = _WithKept(), nn.Linear(8, 8), torch.randn(16, 8)
    block.binary.set_signs(torch.randn(8, 8))
    kept, shift, bits = block.kept.weight.clone(), block.shift.clone(), block.binary.weight.clone()
    block.kept.weight.requires_grad_(False)
    calls = [(((x.bfloat16(),), {}), ((x,), {}))]
    error = reconstruct_block(block, {"binary": block.binary}, teacher, calls, EFFORT, Gang(), lambda steps: None)
    assert error is not None and not torch.equal(block.binary.weight, bits)
    assert torch.equal(block.kept.weight, kept) and not block.kept.weight.requires_grad
    assert torch.equal(block.shift, shift) and block.shift.dtype == torch.bfloat16
    assert block.kept.bias.requires_grad


def test_a_block_that_does_not_get_better_is_put_back() -> None:
    torch.manual_seed(0)
    layer, x = BinaryLinear(8, 8, False, 8, trainable=True), torch.randn(16, 8)
    layer.set_signs(torch.randn(8, 8))
    teacher = BinaryLinear(8, 8, False, 8, trainable=True)
    teacher.load_state_dict(layer.state_dict())
    teacher.set_signs(layer.signs())  # nothing can be better than the very same
    bits = layer.weight.clone()
    calls = [(((x,), {}), ((x,), {}))]
    assert reconstruct_block(layer, {"": layer}, teacher, calls, EFFORT, Gang(), lambda steps: None) == 0.0
    assert torch.equal(layer.weight, bits) and bool((layer.weight_scale == 1).all())


def test_a_teacher_block_that_adds_nothing_is_no_division_by_zero() -> None:
    torch.manual_seed(0)
    layer, x = BinaryLinear(8, 8, False, 8, trainable=True), torch.randn(2, 3, 8)
    layer.set_signs(torch.randn(8, 8))
    calls = [(((x,), {}), ((x,), {}))]
    error = reconstruct_block(layer, {"": layer}, nn.Identity(), calls, EFFORT, Gang(), lambda steps: None)
    assert error is not None and 0.0 < error < 10.0
    assert bool(layer.weight_scale.isfinite().all())
