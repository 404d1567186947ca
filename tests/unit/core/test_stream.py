"""Walking a model block by block gives each block what it reads in an ordinary pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedModel

from kbop_core.convert import plan_conversion
from kbop_core.errors import UnsupportedModel
from kbop_core.init.stream import BlockStream, check_chain

MakeModel = Callable[[str], PreTrainedModel]


def _read_by(model: nn.Module, blocks: tuple[str, ...], ids: Tensor) -> dict[str, tuple[Tensor, dict[str, Any]]]:
    found: dict[str, tuple[Tensor, dict[str, Any]]] = {}

    def see(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[name] = (args[0] if args else kwargs["hidden_states"], kwargs)

        return hook

    handles = [model.get_submodule(b).register_forward_pre_hook(see(b), with_kwargs=True) for b in blocks]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def _check_walk(model: nn.Module, ids: Tensor) -> None:
    blocks = plan_conversion(model, 4).blocks
    wanted = _read_by(model, blocks, ids)
    check_chain(model, blocks, ids)
    stream = BlockStream(model, blocks, ids)
    for block in blocks:
        args, kwargs = stream.call(block)
        hidden, others = wanted[block]
        assert torch.equal(args[0] if args else kwargs["hidden_states"], hidden)
        for name, value in others.items():
            if isinstance(value, Tensor) and name != "hidden_states":
                assert torch.equal(kwargs[name], value), name
        stream.advance(model, block)
    assert not any("forward" in model.get_submodule(block).__dict__ for block in blocks)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt", "gpt_neox"])
def test_each_block_reads_what_it_reads_in_an_ordinary_pass(
    family: str, tiny_model: MakeModel, token_ids: Tensor
) -> None:
    _check_walk(tiny_model(family), token_ids)


def test_blocks_with_masks_of_their_own_get_their_own() -> None:
    """Gemma 2: every other block sees a sliding window only."""
    config = Gemma2Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=3,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    ids = torch.randint(3, 40, (2, 12))
    _check_walk(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval(), ids)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, extra: Tensor) -> Tensor:
        out: Tensor = self.linear(hidden_states) + extra
        return out


class _NoChain(nn.Module):
    """Each block also reads the output of the one before the last."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.layers = nn.ModuleList([_Block() for _ in range(4)])
        self.calls = calls

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden = extra = self.embedding(input_ids)
        for layer in self.layers[: self.calls]:
            hidden, extra = layer(hidden, extra=extra), hidden
        return hidden


def test_a_model_whose_blocks_share_more_than_hidden_states_is_refused() -> None:
    torch.manual_seed(0)
    model, blocks = _NoChain(4), ("layers.0", "layers.1", "layers.2", "layers.3")
    with pytest.raises(UnsupportedModel, match="hand on more than hidden states"):
        check_chain(model, blocks, torch.arange(6)[None])


class _SideInput(_NoChain):
    """One channel is 200 times the others, as massive activations are, and the others get a side input."""

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden, extra = self.embedding(input_ids) + torch.tensor([200.0, 0.0, 0.0, 0.0]), torch.zeros(4)
        for layer in self.layers:
            hidden, extra = hidden + layer(torch.tanh(hidden), extra=extra), 0.3 * hidden[..., 1:2]
        return hidden


def test_a_side_input_is_seen_beside_a_massive_channel() -> None:
    torch.manual_seed(0)
    blocks = ("layers.0", "layers.1", "layers.2", "layers.3")
    with pytest.raises(UnsupportedModel, match="hand on more than hidden states"):
        check_chain(_SideInput(4), blocks, torch.arange(6)[None])


def test_no_walk_makes_logits(tiny_model: MakeModel, token_ids: Tensor) -> None:
    model, calls = tiny_model("llama"), list[int]()
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    blocks = plan_conversion(model, 4).blocks
    check_chain(model, blocks, token_ids)
    BlockStream(model, blocks, token_ids)
    assert not calls


def test_a_model_that_leaves_blocks_out_is_refused_and_left_as_it_was() -> None:
    model, blocks = _NoChain(2), ("layers.0", "layers.1", "layers.2", "layers.3")
    with pytest.raises(UnsupportedModel, match="calls 2 of its 4 blocks"):
        BlockStream(model, blocks, torch.arange(6)[None])
    assert not any("forward" in layer.__dict__ for layer in model.layers)
