"""Fixtures for the core: one thread, a seeded generator, tiny models of every family with a tokenizer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from kbop_core.kbop import KBOP, FlipStats
from kbop_core.layers import BinaryLinear
from kbop_core.schedules import FlipSchedule

VOCABULARY = 40

#: Width 12 and 20: neither a multiple of 8, so every packed row has a ragged tail.
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
ROTARY = COMMON | {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**ROTARY, num_key_value_heads=1, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**ROTARY, num_key_value_heads=1, tie_word_embeddings=False),
    "opt": lambda: OPTConfig(
        **COMMON,
        hidden_size=12,
        ffn_dim=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        word_embed_proj_dim=12,
    ),
    "gpt2": lambda: GPT2Config(**COMMON, n_embd=12, n_inner=20, n_layer=2, n_head=2, n_positions=32),
    "gpt_neox": lambda: GPTNeoXConfig(**ROTARY),
}
FAMILIES = tuple(CONFIGS)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@dataclass
class Learner:
    """One layer, named a, and the optimizer that flips its signs."""

    layer: BinaryLinear
    kbop: KBOP

    def step(self, *gradients: torch.Tensor) -> FlipStats:
        """One step whose micro-steps have these gradients, which are not overwritten."""
        assert self.layer.gradient_sink is not None
        for gradient in gradients:
            self.layer.gradient_sink(gradient.clone())
        return self.kbop.step()

    @property
    def evidence(self) -> torch.Tensor:
        """m, float64; between two steps it has decayed for the coming one already."""
        return self.kbop.shards["a"].evidence.values().double() * self.kbop.unit


@pytest.fixture
def learner() -> Callable[..., Learner]:
    """(rows, columns, schedule, …KBOP's own options) → random signs, drawn from `seed`, and an optimizer for them."""

    def make(rows: int, columns: int, schedule: FlipSchedule, seed: int = 0, **options: Any) -> Learner:
        layer = BinaryLinear(columns, rows, False, 8, trainable=True)
        layer.set_signs(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))
        return Learner(layer, KBOP({"a": layer}, schedule, **options))

    return make


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    """A tokenizer of the words w0 … w39."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", bos_token="w1", eos_token="w2")


@pytest.fixture
def tiny_model() -> Callable[[str], PreTrainedModel]:
    """Family → model with random weights, always the same ones, biases and norms included; no gradients."""

    def make(family: str) -> PreTrainedModel:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[family]()).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
            else:
                parameter *= 5.0 if "embed" not in name else 1.0
        return model

    return make


@pytest.fixture
def source_folder(
    tmp_path: Path, tiny_model: Callable[[str], PreTrainedModel], words: PreTrainedTokenizerFast
) -> Callable[[str], Path]:
    """Family → folder of a pretrained model in Hugging Face form."""

    def save(family: str) -> Path:
        folder = tmp_path / f"{family}-source"
        tiny_model(family).save_pretrained(folder)
        words.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def token_ids() -> torch.Tensor:
    """Three windows of 16 tokens, int64 (B, T)."""
    return torch.randint(0, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def no_leftovers(tmp_path: Path) -> Iterator[None]:
    """After the test no temporary file or folder is left anywhere below its own folder."""
    yield
    assert [p.name for p in tmp_path.rglob(".*") if "writing" in p.name or "parts" in p.name] == []
