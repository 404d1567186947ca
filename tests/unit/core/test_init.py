"""BNN Init of whole models: from pretrained weights, and from random signs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kbop_core.convert import binary_layers, convert_plain, plan_conversion
from kbop_core.init.fit import FitEffort
from kbop_core.init.pretrained import InitEffort, pretrained_init
from kbop_core.init.random import random_init
from kbop_core.layers import BinaryLinear

MakeModel = Callable[[str], PreTrainedModel]


def error(model: nn.Module, wanted: Tensor, ids: Tensor) -> float:
    with torch.no_grad():
        return float((model(input_ids=ids).logits - wanted).square().mean() / wanted.square().mean())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt", "gpt_neox"])
def test_fitting_lowers_the_output_error_of_the_whole_model(
    family: str, tiny_model: MakeModel, token_ids: Tensor
) -> None:
    dense, plain, fitted = (tiny_model(family) for _ in range(3))
    wanted = dense(input_ids=token_ids).logits
    convert_plain(plain, plan_conversion(plain, 4), trainable=True)
    pretrained_init(fitted, dense, plan_conversion(fitted, 4), [token_ids])
    assert error(fitted, wanted, token_ids) < 0.8 * error(plain, wanted, token_ids)


def test_every_layer_of_the_plan_becomes_trainable_and_no_other(tiny_model: MakeModel, token_ids: Tensor) -> None:
    model = tiny_model("qwen2")
    plan, bias = plan_conversion(model, 4), model.model.layers[1].self_attn.q_proj.bias.clone()
    pretrained_init(model, tiny_model("qwen2"), plan, [token_ids])
    layers = binary_layers(model)
    assert list(layers) == [e.name for e in plan.binary]
    assert all(isinstance(la.weight_scale, nn.Parameter) for la in layers.values())
    assert torch.equal(model.model.layers[1].self_attn.q_proj.bias, bias)


def test_progress_counts_every_layer_once(tiny_model: MakeModel, token_ids: Tensor) -> None:
    model, told = tiny_model("llama"), []
    progress = lambda *place: told.append(place)  # noqa: E731
    pretrained_init(model, tiny_model("llama"), plan_conversion(model, 4), [token_ids], progress=progress)
    assert told == [(i + 1, 14) for i in range(14)]


def test_how_calibration_windows_are_batched_does_not_matter(tiny_model: MakeModel, token_ids: Tensor) -> None:
    models = [tiny_model("llama") for _ in range(2)]
    for model, batches in zip(models, ([token_ids], list(token_ids.split(1))), strict=True):
        pretrained_init(model, tiny_model("llama"), plan_conversion(model, 4), batches)
    one, other = (model(input_ids=token_ids).logits for model in models)
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_no_hook_is_left_on_the_model(tiny_model: MakeModel, token_ids: Tensor) -> None:
    model, teacher = tiny_model("gpt2"), tiny_model("gpt2")
    pretrained_init(model, teacher, plan_conversion(model, 4), [token_ids], InitEffort(FitEffort(rounds=1, sweeps=1)))
    for modules in (model.named_modules(), teacher.named_modules()):
        assert [n for n, m in modules if m._forward_pre_hooks or m._forward_hooks] == []


def test_the_teacher_is_not_changed(tiny_model: MakeModel, token_ids: Tensor) -> None:
    model, teacher = tiny_model("llama"), tiny_model("llama")
    pretrained_init(model, teacher, plan_conversion(model, 4), [token_ids])
    assert binary_layers(teacher) == {}
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), tiny_model("llama").parameters(), strict=True))


def test_no_calibration_window_is_an_error_before_anything_changes(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="no calibration window"):
        pretrained_init(model, tiny_model("llama"), plan_conversion(model, 4), [])
    assert binary_layers(model) == {}


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.used(x)


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(5, 8), nn.ModuleList([_Block(), _Block()])

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        x = self.embed(input_ids)
        for block in self.layers:
            x = block(x)
        return x


def test_a_layer_that_never_runs_gets_plain_signs_and_means() -> None:
    model = _Model().requires_grad_(False)
    weight = model.layers[0].unused.weight.clone()
    pretrained_init(model, copy.deepcopy(model), plan_conversion(model, 8), [torch.arange(5)[None]])
    layer = binary_layers(model)["layers.0.unused"]
    assert torch.equal(layer.signs(), torch.where(weight >= 0, 1.0, -1.0))
    torch.testing.assert_close(layer.weight_scale.detach(), weight.abs().mean(1, keepdim=True))


@pytest.mark.parametrize("width", [256, 500])
def test_random_signs_keep_the_variance_of_activations_through_depth(width: int, generator: torch.Generator) -> None:
    x = torch.randn(256, width, generator=generator)
    before = float(x.square().mean())
    for _ in range(12):
        layer = BinaryLinear(width, width, False, 64, trainable=True)
        random_init(layer, generator)
        x = layer(x).detach()
    assert 0.9 < float(x.square().mean()) / before < 1.1


@pytest.mark.parametrize(("columns", "gain"), [(1, 1.0), (9, 1.0), (128, 2.0)])
def test_every_random_scale_is_gain_over_root_fan_in(columns: int, gain: float, generator: torch.Generator) -> None:
    layer = BinaryLinear(columns, 3, False, 64, trainable=True)
    random_init(layer, generator, gain)
    expected = torch.full_like(layer.weight_scale, gain / math.sqrt(columns))
    assert torch.equal(layer.weight_scale.detach(), expected.detach())


def test_equal_seeds_give_equal_signs_and_other_seeds_do_not() -> None:
    layers = [BinaryLinear(129, 20, False, 64, trainable=True) for _ in range(3)]
    for layer, seed in zip(layers, (1, 1, 2), strict=True):
        random_init(layer, torch.Generator().manual_seed(seed))
    assert torch.equal(layers[0].weight, layers[1].weight)
    assert not torch.equal(layers[0].weight, layers[2].weight)


def test_random_signs_are_fair(generator: torch.Generator) -> None:
    layer = BinaryLinear(200, 200, False, 64, trainable=True)
    random_init(layer, generator)
    assert abs(float(layer.signs().mean())) < 0.02
