"""Sizes of models: from configs, from weight files, and the same as transformers builds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from jobs.errors import UnknownModel, UnknownShape
from jobs.model_shape import ModelShape, shape_of_config, shape_of_folder, shape_of_source
from jobs.plan_table import KNOWN_CONFIGS, known_shape
from jobs.sources import locate_model
from kbop_core.convert import plan_conversion

LLAMA = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS: list[dict[str, Any]] = [
    LLAMA | {"model_type": "llama", "tie_word_embeddings": True},
    LLAMA | {"model_type": "llama", "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    LLAMA | {"model_type": "mistral", "tie_word_embeddings": False, "head_dim": 16},
    LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True},
    LLAMA | {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 16},
    {"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64},
    {
        "model_type": "opt", "hidden_size": 48, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": 100, "max_position_embeddings": 64, "word_embed_proj_dim": 48, "tie_word_embeddings": True,
    },
]  # fmt: skip
NAMES = [f"{c['model_type']}-{number}" for number, c in enumerate(CONFIGS)]


def build(config: dict[str, Any]) -> PreTrainedModel:
    settings = {k: v for k, v in config.items() if k != "model_type"} | {"bos_token_id": 1, "eos_token_id": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings))


def binary_sizes(model: PreTrainedModel) -> list[tuple[str, int, int]]:
    return sorted((e.name, e.out_features, e.in_features) for e in plan_conversion(model, 16).binary)


def sizes(shape: ModelShape) -> list[tuple[str, int, int]]:
    return sorted((la.name, la.out_features, la.in_features) for la in shape.linears)


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_a_config_implies_the_layers_and_the_parameters_that_transformers_builds(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = build(config)
    shape = shape_of_config(config, "x")
    assert sizes(shape) == binary_sizes(model) and not shape.exact
    assert shape.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_weight_files_say_the_same(config: dict[str, Any], tmp_path: Path) -> None:
    model = build(config)
    model.save_pretrained(tmp_path)
    shape = shape_of_folder(tmp_path, "x")
    assert shape.exact and shape.parameters == sum(p.numel() for p in model.parameters())
    assert sorted(la.weights for la in shape.linears) == sorted(o * i for _, o, i in binary_sizes(model))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("0.6B", 596_049_920),
        ("1.7B", 1_720_574_976),
        ("8B", 8_190_735_360),
        ("32B", 32_762_123_264),
        ("70B", 70_553_706_496),
    ],
)
def test_known_shapes_have_the_parameters_their_models_are_published_with(name: str, parameters: int) -> None:
    shape = known_shape(name)
    assert shape is not None and shape.parameters == parameters


def test_an_unknown_name_is_no_known_shape() -> None:
    assert known_shape("9B") is None and "9B" not in KNOWN_CONFIGS


def test_an_unknown_family_is_refused_by_name() -> None:
    with pytest.raises(UnknownShape, match="'mamba'") as refused:
        shape_of_config({"model_type": "mamba"}, "x")
    assert "llama" in refused.value.hint


@pytest.mark.parametrize("value", [None, 0, -1, "48", 4.5])
def test_a_size_that_is_no_whole_number_is_refused_with_its_key(value: object) -> None:
    with pytest.raises(UnknownShape, match="hidden_size"):
        shape_of_config(LLAMA | {"model_type": "llama", "hidden_size": value}, "x")


def test_an_opt_with_projected_embeddings_is_refused() -> None:
    with pytest.raises(UnknownShape, match="projected"):
        shape_of_config(CONFIGS[-1] | {"word_embed_proj_dim": 24}, "x")


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match=r"config\.json"):
        shape_of_folder(tmp_path, "x")


def test_files_of_another_model_than_the_config_are_refused(tmp_path: Path) -> None:
    build(CONFIGS[0]).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[0] | {"num_hidden_layers": 3}))
    with pytest.raises(UnknownShape, match="weight files"):
        shape_of_folder(tmp_path, "x")


def test_a_hub_model_is_refused_because_nothing_is_downloaded() -> None:
    with pytest.raises(UnknownModel, match="hub"):
        shape_of_source(locate_model("owner/name"), "owner/name")
