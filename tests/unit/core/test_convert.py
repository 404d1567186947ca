"""The conversion plan: which layers become binary in every family, which stay, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kbop_core.convert import (
    binary_layers,
    check_finite,
    convert_plain,
    insert_empty,
    linear_shape,
    linear_weight,
    plan_conversion,
)
from kbop_core.errors import BadWeights, NothingToBinarize, UnsupportedModel

MakeModel = Callable[[str], PreTrainedModel]

ROTARY = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
#: Family → blocks' prefix, layers of a block, layers with a bias.
EXPECTED = {
    "llama": ("model.layers", ROTARY + GATED, ()),
    "qwen2": ("model.layers", ROTARY + GATED, ROTARY[:3]),
    "opt": (
        "model.decoder.layers",
        (*(f"self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "out_proj")), "fc1", "fc2"),
        (*(f"self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "out_proj")), "fc1", "fc2"),
    ),
    "gpt2": ("transformer.h", *(2 * (("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),))),
    "gpt_neox": (
        "gpt_neox.layers",
        *(2 * (("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),)),
    ),
}


@pytest.mark.parametrize("family", EXPECTED)
def test_the_plan_names_every_linear_of_the_blocks_and_keeps_the_head(family: str, tiny_model: MakeModel) -> None:
    prefix, layers, with_bias = EXPECTED[family]
    plan = plan_conversion(tiny_model(family), 4)
    assert plan.blocks == (f"{prefix}.0", f"{prefix}.1")
    assert {e.name for e in plan.binary} == {f"{b}.{n}" for b in plan.blocks for n in layers}
    assert {e.name for e in plan.binary if e.bias} == {f"{b}.{n}" for b in plan.blocks for n in with_bias}
    assert {(e.name, e.reason) for e in plan.kept} == {("lm_head", "outside the decoder blocks")}


@pytest.mark.parametrize("family", EXPECTED)
def test_planning_changes_nothing(family: str, tiny_model: MakeModel) -> None:
    model = tiny_model(family)
    modules = dict(model.named_modules())
    plan_conversion(model, 4)
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize("family", EXPECTED)
def test_everything_outside_the_plan_stays_the_very_same_tensor(family: str, tiny_model: MakeModel) -> None:
    model = tiny_model(family)
    plan = plan_conversion(model, 4)
    before = {n: p for n, p in model.named_parameters() if not any(n.startswith(e.name + ".") for e in plan.binary)}
    convert_plain(model, plan, trainable=True)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert any("embed" in n or "wte" in n for n in before)
    assert any("norm" in n or "ln_" in n for n in before)


@pytest.mark.parametrize("family", EXPECTED)
def test_plain_layers_are_the_sign_and_the_group_mean_of_the_weight(family: str, tiny_model: MakeModel) -> None:
    dense, model = tiny_model(family), tiny_model(family)
    plan = plan_conversion(model, 4)
    for name, layer in convert_plain(model, plan, trainable=False).items():
        weight = linear_weight(dense.get_submodule(name))
        assert torch.equal(layer.signs(), torch.where(weight >= 0, 1.0, -1.0))
        means = weight.reshape(*layer.weight_scale.shape, -1).abs().mean(-1)
        torch.testing.assert_close(layer.weight_scale.float(), means, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", EXPECTED)
def test_a_binary_model_computes_what_a_dense_one_with_the_same_weights_does(
    family: str, tiny_model: MakeModel, token_ids: Tensor
) -> None:
    dense, model = tiny_model(family), tiny_model(family)
    for name, layer in convert_plain(model, plan_conversion(model, 4), trainable=True).items():
        linear_weight(dense.get_submodule(name)).copy_(layer.dense())
    torch.testing.assert_close(
        model(input_ids=token_ids).logits, dense(input_ids=token_ids).logits, rtol=1e-4, atol=1e-4
    )


def test_a_conv1d_is_read_transposed(tiny_model: MakeModel) -> None:
    model = tiny_model("gpt2")
    stored = model.transformer.h[0].attn.c_attn.weight.clone()
    assert stored.shape == (12, 36)
    assert linear_shape(model.transformer.h[0].attn.c_attn) == (36, 12)
    layer = convert_plain(model, plan_conversion(model, 12), trainable=False)["transformer.h.0.attn.c_attn"]
    assert torch.equal(layer.signs() > 0, stored.t() >= 0)


def test_grouped_query_attention_gives_smaller_key_and_value_layers(tiny_model: MakeModel) -> None:
    shapes = {
        e.name.rsplit(".", 1)[1]: (e.out_features, e.in_features)
        for e in plan_conversion(tiny_model("llama"), 4).binary
    }
    assert shapes["q_proj"] == (12, 12)
    assert shapes["k_proj"] == shapes["v_proj"] == (6, 12)
    assert shapes["down_proj"] == (12, 20)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_tied_heads_stay_tied(family: str, tiny_model: MakeModel) -> None:
    model = tiny_model(family)
    convert_plain(model, plan_conversion(model, 4), trainable=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_biases_keep_their_values(tiny_model: MakeModel) -> None:
    dense, model = tiny_model("qwen2"), tiny_model("qwen2")
    for name, layer in convert_plain(model, plan_conversion(model, 4), trainable=True).items():
        bias = dense.get_submodule(name).bias
        assert (bias is None and layer.bias is None) or torch.equal(bias, layer.bias)


@pytest.mark.parametrize(("group_size", "groups"), [(1, 12), (4, 3), (5, 1), (12, 1), (128, 1)])
def test_counts_of_weights_and_scales_follow_from_the_shapes(
    group_size: int, groups: int, tiny_model: MakeModel
) -> None:
    plan = plan_conversion(tiny_model("gpt2"), group_size)
    entry = next(e for e in plan.binary if e.name.endswith("c_attn"))
    assert entry.groups == groups
    assert plan.weights == 2 * (36 * 12 + 12 * 12 + 20 * 12 + 12 * 20)
    assert plan.scales == sum(e.out_features * e.groups for e in plan.binary)


def test_a_plan_is_plain_data_for_reports(tiny_model: MakeModel) -> None:
    plan = plan_conversion(tiny_model("llama"), 4)
    again = json.loads(json.dumps(plan.to_dict()))
    assert [e["name"] for e in again["binary"]] == [e.name for e in plan.binary]
    assert again["kept"] == [{"name": "lm_head", "reason": "outside the decoder blocks"}]


@pytest.mark.parametrize(
    ("keep", "missing"),
    [
        (("*.down_proj",), {"mlp.down_proj"}),
        (("model.layers.0.*",), set()),
        (("*q_proj", "*k_proj"), {"self_attn.q_proj", "self_attn.k_proj"}),
    ],
)
def test_layers_named_by_keep_stay_and_say_why(keep: tuple[str, ...], missing: set[str], tiny_model: MakeModel) -> None:
    plan = plan_conversion(tiny_model("llama"), 4, keep)
    asked = {e.name for e in plan.kept if e.reason == "asked for by `keep`"}
    assert asked
    assert not asked & {e.name for e in plan.binary}
    assert {f"model.layers.1.{n}" for n in missing} <= asked


@pytest.mark.parametrize("pattern", ["typo_proj", "model.norm", "MODEL.*", ""])
def test_a_keep_pattern_that_matches_no_linear_is_refused(pattern: str, tiny_model: MakeModel) -> None:
    with pytest.raises(UnsupportedModel, match="keep names no linear layer"):
        plan_conversion(tiny_model("llama"), 4, ["lm_head", pattern])


@pytest.mark.parametrize("group_size", [0, -1])
def test_an_illegal_group_size_is_refused(group_size: int, tiny_model: MakeModel) -> None:
    with pytest.raises(ValueError, match=f"group_size is {group_size}; legal: 1 or more"):
        plan_conversion(tiny_model("llama"), group_size)


# -- structures of our own --------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


class Decoder(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)


@pytest.mark.parametrize("name", ["gate", "router"])
def test_what_picks_experts_stays(name: str) -> None:
    plan = plan_conversion(Decoder(Block(**{name: nn.Linear(8, 4), "gate_proj": nn.Linear(8, 8)})), 8)
    assert [e.name for e in plan.binary] == ["layers.0.gate_proj"]
    assert [(e.name, e.reason) for e in plan.kept] == [(f"layers.0.{name}", "picks experts")]


def test_one_weight_in_two_layers_is_refused() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    model = Decoder(Block(a=first), Block(a=second))
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.a and layers\.1\.a share one weight"):
        plan_conversion(model, 8)


def test_one_layer_used_in_two_blocks_is_refused() -> None:
    shared = nn.Linear(8, 8)
    with pytest.raises(UnsupportedModel, match="share one weight"):
        plan_conversion(Decoder(Block(a=shared), Block(a=shared)), 8)


def test_keeping_one_of_two_layers_that_share_a_weight_is_refused() -> None:
    shared = nn.Linear(8, 8)
    with pytest.raises(UnsupportedModel, match="share one weight"):
        plan_conversion(Decoder(Block(a=shared, b=nn.Linear(8, 8)), Block(a=shared)), 8, ["layers.1.a"])


def test_shared_layers_may_stay_when_all_of_them_are_kept() -> None:
    shared = nn.Linear(8, 8)
    plan = plan_conversion(Decoder(Block(a=shared, b=nn.Linear(8, 8)), Block(a=shared)), 8, ["*.a"])
    assert [e.name for e in plan.binary] == ["layers.0.b"]


@pytest.mark.parametrize(
    "model",
    [nn.Linear(8, 8), nn.Embedding(4, 8), Decoder(), Decoder(Block(a=nn.LayerNorm(8))), Decoder(nn.Conv1d(8, 8, 1))],
)
def test_a_model_without_linears_in_blocks_is_refused(model: nn.Module) -> None:
    with pytest.raises(NothingToBinarize):
        plan_conversion(model, 8)


def test_keeping_every_layer_leaves_nothing_and_is_refused(tiny_model: MakeModel) -> None:
    with pytest.raises(NothingToBinarize, match="no linear layer to binarize in its decoder blocks"):
        plan_conversion(tiny_model("llama"), 4, ["*"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_numbers_are_refused_by_name(bad: float, tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    model.model.norm.weight[3] = bad
    model.model.layers[1].mlp.up_proj.weight[0, 0] = bad
    with pytest.raises(BadWeights, match=r"2 tensors of the model, first model.layers.1.mlp.up_proj.weight"):
        check_finite(model)


@pytest.mark.parametrize("family", EXPECTED)
def test_healthy_weights_pass(family: str, tiny_model: MakeModel) -> None:
    check_finite(tiny_model(family))


def test_empty_layers_take_shape_and_device_of_what_they_replace() -> None:
    with torch.device("meta"):
        model = Decoder(Block(a=nn.Linear(9, 4), b=nn.Linear(16, 4, bias=False)))
    insert_empty(model, ["layers.0.a", "layers.0.b"], 8)
    layers = binary_layers(model)
    assert [(la.weight.shape, la.weight_scale.shape) for la in layers.values()] == [((4, 2), (4, 1)), ((4, 2), (4, 2))]
    assert all(la.weight.is_meta and la.weight_scale.is_meta for la in layers.values())
    assert [la.bias is not None for la in layers.values()] == [True, False]
