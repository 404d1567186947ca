"""`make bench-step`: what one training step costs and holds, KBOP beside latent weights with STE and AdamW.

Same model, batch, teacher, loss and one thread; the steps of the methods alternate, and the ratio is that of the
medians. The peers are the fastest form of latent training (plain torch, fused AdamW) and the same inside a DeepSpeed
engine as ours is. Random weights: speed does not depend on them. State is the bytes of the tensors that belong to
binary weights and live between two steps: bits and evidence here; latent weights and both Adam moments there.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.record import claim, publish
from jobs.process import free_port
from kbop_core.baselines.latent import convert_latent
from kbop_core.convert import convert_plain, plan_conversion
from kbop_core.distill import distillation_loss, teacher_logits
from kbop_core.engine import Engine, EngineConfig, gang_of_ranks
from kbop_core.loop import TrainConfig, layout_steps, start_run, train
from kbop_core.shard import Gang
from kbop_core.window_source import WindowsInMemory

STEPS, WARMUP = 20, 4


@dataclass(frozen=True)
class Shape:
    """A LLaMA-class shape and a batch."""

    name: str
    hidden: int
    ffn: int
    layers: int
    context: int
    windows: int

    def model(self) -> LlamaForCausalLM:
        heads = self.hidden // 64
        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            vocab_size=1024,
            max_position_embeddings=self.context,
            tie_word_embeddings=True,
        )
        return LlamaForCausalLM(config)


SHAPES = (
    Shape("1 M weights", 128, 384, 6, 256, 8),
    Shape("6 M weights", 512, 1408, 2, 256, 8),
)


@dataclass
class Method:
    """One way to train: `step` does one step; `state_bytes` is what it holds per binary weight between steps."""

    name: str
    step: Callable[[], object]
    state_bytes: Callable[[], float | None]


def kbop(shape: Shape, teacher: LlamaForCausalLM, ids: torch.Tensor, gang: Gang) -> Method:
    student = shape.model()
    plan = plan_conversion(student, 128)
    convert_plain(student, plan, trainable=True)
    layout = layout_steps(shape.context * shape.windows, shape.context, 1, shape.windows)
    windows = WindowsInMemory(ids, seed=0)
    run = start_run(student, teacher, windows, TrainConfig(steps=10 * STEPS), layout, gang)
    steps = train(run, range(10 * STEPS))
    return Method("KBOP", lambda: next(steps), lambda: run.kbop.state_bytes() / plan.weights)


def latent(shape: Shape, teacher: LlamaForCausalLM, ids: torch.Tensor, deepspeed: bool) -> Method:
    student = shape.model()
    plan = plan_conversion(student, 128)
    layers = convert_latent(student, plan)
    batches = _batches(shape, ids)
    if deepspeed:
        groups = [{"params": list(student.parameters()), "lr": 1e-3}]
        engine = Engine(student, groups, EngineConfig(shape.windows, 1), Gang(), timeout_s=60)

        def step() -> None:
            batch = next(batches)
            engine.backward(distillation_loss(engine(batch), teacher_logits(teacher, batch)))
            engine.step()

        return Method("latent + AdamW in DeepSpeed", step, lambda: None)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0, fused=True)

    def plain_step() -> None:
        batch = next(batches)
        logits = student(input_ids=batch, use_cache=False).logits
        loss = distillation_loss(logits, teacher_logits(teacher, batch))
        if not torch.isfinite(loss):
            raise ValueError("loss is not finite")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def state() -> float:
        held = 0
        for layer in layers.values():
            held += layer.latent.nbytes
            held += sum(t.nbytes for t in optimizer.state[layer.latent].values() if t.dim())
        return held / plan.weights

    return Method("latent + AdamW (fused)", plain_step, state)


def _batches(shape: Shape, ids: torch.Tensor) -> Iterator[torch.Tensor]:
    while True:
        yield from ids.split(shape.windows)


def measure(shape: Shape, gang: Gang) -> list[dict[str, object]]:
    torch.manual_seed(0)
    teacher = shape.model().eval().requires_grad_(False)
    ids = torch.randint(0, 1024, (shape.windows * 8, shape.context))
    methods = [kbop(shape, teacher, ids, gang), latent(shape, teacher, ids, False), latent(shape, teacher, ids, True)]
    seconds: dict[str, list[float]] = {m.name: [] for m in methods}
    for number in range(STEPS):
        for method in methods:
            began = time.perf_counter()
            method.step()
            if number >= WARMUP:
                seconds[method.name].append(time.perf_counter() - began)
    base = statistics.median(seconds[methods[0].name])
    rows: list[dict[str, object]] = []
    for method in methods:
        median = statistics.median(seconds[method.name])
        rows.append(
            {
                "model": shape.name,
                "method": method.name,
                "ms_per_step": 1e3 * median,
                "kbop_time_ratio": base / median,
                "state_bytes_per_weight": method.state_bytes(),
            }
        )
    del methods
    gc.collect()
    return rows


def main() -> None:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(free_port())
    torch.set_num_threads(1)  # with two, whatever else runs on the machine disturbs one method more than another
    with gang_of_ranks("cpu", 600) as gang:
        rows = [row for shape in SHAPES for row in measure(shape, gang)]
    claims = []
    for shape in SHAPES:
        ours, peer, _ = (row for row in rows if row["model"] == shape.name)
        ratio, held = float(str(peer["kbop_time_ratio"])), float(str(ours["state_bytes_per_weight"]))
        claims.append(claim(f"KBOP step / latent step, {shape.name}", ratio, "ratio", "<= 1.10"))
        claims.append(claim(f"KBOP state, {shape.name}", held, "bytes/weight", "<= 4.125"))
        claims.append(
            claim(f"latent state, {shape.name}", float(str(peer["state_bytes_per_weight"])), "bytes/weight", ">= 12")
        )
    publish("step", "make bench-step", rows, claims)


if __name__ == "__main__":
    main()
