"""Methods of the quality bench on a tiny model: what sets them apart is there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.quality.methods import METHODS
from benchmarks.quality.training import RunConfig
from kbop_core.convert import binary_layers, plan_conversion

STEPS = 4


def tiny_task() -> Any:
    """What a method asks of a task."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}

    def fresh_model() -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()

    return SimpleNamespace(fresh_model=fresh_model, plan=plan_conversion(fresh_model(), 8))


def test_kbop_as_in_the_paper_has_one_scale_a_layer_and_keeps_it_one_while_it_learns() -> None:
    task = tiny_task()
    student = METHODS["paper"](task, RunConfig("demo", "paper", 1024 * STEPS, lr=1.0))
    layers = binary_layers(student.model)
    optimizer = torch.optim.AdamW(student.model.parameters(), lr=0.01)
    before = {name: float(layer.weight_scale.detach()[0, 0]) for name, layer in layers.items()}
    assert student.bits == 1.0 + 16 * len(layers) / task.plan.weights and student.flipper is not None
    ids = torch.arange(24).view(2, 12)
    for _ in range(STEPS):
        student.model(input_ids=ids, labels=ids).loss.backward()
        student.flipper.step()
        optimizer.step()
        optimizer.zero_grad()
    for name, layer in layers.items():
        scale = layer.weight_scale.detach()
        assert bool((scale == scale[0, 0]).all()) and float(scale[0, 0]) != before[name]
