"""Column scales that several layers share leave no trace once folded: any format holds the result."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from benchmarks.quality.columns import ColumnScales
from kbop_core.convert import convert_plain, plan_conversion

SMALL: dict[str, Any] = {"vocab_size": 31, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.arange(24).view(2, 12)


def _llama() -> nn.Module:
    config = LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, max_position_embeddings=32)
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def _opt() -> nn.Module:
    config = OPTConfig(**SMALL, ffn_dim=48, max_position_embeddings=32, word_embed_proj_dim=32)
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


@pytest.mark.parametrize("make", [_llama, _opt])
@pytest.mark.parametrize("kind", ["shared", "own"])
def test_shared_columns_fold_into_what_gives_the_tensor_and_own_ones_do_not(make: Any, kind: Any) -> None:
    torch.manual_seed(0)
    model = make().eval()
    layers = convert_plain(model, plan_conversion(model, 16), trainable=True)
    plain = _logits(model)
    columns = ColumnScales(model, layers, kind, IDS)
    assert torch.equal(_logits(model), plain), "scales of one change nothing"
    scales = {layer.column_scale for layer in layers.values()}
    assert len(scales) == (8 if kind == "shared" else len(layers))
    with torch.no_grad():
        for scale in scales:
            scale.uniform_(-1.5, -0.5)
    scaled = _logits(model)
    assert not torch.allclose(scaled, plain, atol=1e-3)
    columns.fold()
    if kind == "shared":
        assert all(bool((scale == 1).all()) for scale in scales)
        torch.testing.assert_close(_logits(model), scaled, atol=1e-5, rtol=1e-4)
    else:
        assert torch.equal(_logits(model), scaled)


def test_a_layer_whose_input_nothing_known_gives_is_refused() -> None:
    model = _llama().eval()
    layers = convert_plain(model, plan_conversion(model, 16), trainable=True)
    del layers["model.layers.1.mlp.up_proj"]
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj reads neither"):
        ColumnScales(model, layers, "shared", IDS)


@pytest.mark.parametrize("field", ["activation_function", "hidden_act"])
def test_an_activation_that_passes_no_factor_is_refused(field: str) -> None:
    model = _opt().eval()
    layers = convert_plain(model, plan_conversion(model, 16), trainable=True)
    model.config = SimpleNamespace(hidden_size=32, num_attention_heads=4, **{field: "gelu"})
    with pytest.raises(ValueError, match="gelu does not pass a factor from fc1 to fc2"):
        ColumnScales(model, layers, "shared", IDS)
