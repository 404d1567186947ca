"""The tiny LLaMA and the windows of tokens that the ranks share."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

VOCABULARY = 40


def make_llama(seed: int) -> PreTrainedModel:
    """Twelve wide, four key and value rows: a seed gives the same weights on every rank."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter *= 1.0 if name.endswith("norm.weight") else 5.0
    return model


def make_gpt2_with_dropout(seed: int) -> PreTrainedModel:
    """A tiny GPT-2 that drops half of everything in training mode."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "n_embd": 12, "n_layer": 1, "n_head": 2, "n_positions": 32}
    config = GPT2Config(**sizes, embd_pdrop=0.5, resid_pdrop=0.5, attn_pdrop=0.5, bos_token_id=1, eos_token_id=2)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def make_windows(count: int, context: int) -> Tensor:
    """Random tokens 3 … V−1, int64 (N, T)."""
    return torch.randint(3, VOCABULARY, (count, context), generator=torch.Generator().manual_seed(count))
