"""Owns what one rank does: a model of random weights under KBOP or latent weights, measured over a few steps.

    RANK=… WORLD_SIZE=… python -m benchmarks.scaling.cases '{"method": "kbop", …}' FILE

Speed, memory and traffic do not depend on what the weights are.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.scaling.counters import LiveTensors, Wire
from kbop_core.baselines.latent import LatentLinear, convert_latent
from kbop_core.convert import ConversionPlan, convert_plain, plan_conversion
from kbop_core.distill import distillation_loss, teacher_logits
from kbop_core.engine import Engine, EngineConfig, gang_of_ranks
from kbop_core.evidence import EvidenceKind
from kbop_core.flops import ModelSize, flops_per_token, peak_flops
from kbop_core.kbop import FlipStats
from kbop_core.loop import Run, StepLayout, TrainConfig, start_run, train
from kbop_core.phases import Phases
from kbop_core.recompute import recompute_blocks
from kbop_core.shard import Gang
from kbop_core.training_state import StateWriter, save_state
from kbop_core.window_source import WindowsInMemory

WARMUP = 2
#: Student and teacher.
Models = tuple[nn.Module, nn.Module]


@dataclass(frozen=True)
class Shape:
    """A LLaMA-class shape; heads of 64 … 128, a small vocabulary where only the blocks are of interest."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 1024

    def model(self, context: int, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=context,
            tie_word_embeddings=True,
        )
        with torch.device(device):
            return LlamaForCausalLM(config).to(dtype)


SHAPES = {
    "1 M": Shape(128, 384, 6, 2, 2),
    "13 M": Shape(512, 1408, 4, 8, 8),
    "51 M, wide": Shape(2048, 5632, 1, 16, 16),
    "1 B": Shape(2048, 8192, 16, 32, 8, 128_256),
    "8 B": Shape(4096, 14_336, 32, 32, 8, 128_256),
}


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        shape: name in SHAPES.
        method: "kbop", or "latent": STE, AdamW and ZeRO stage 2.
        context, windows: tokens in a window, and windows of a step, all ranks.
        steps: measured after WARMUP others.
        evidence: of KBOP.
        bf16: the engine's dtype, as on GPUs.
        recompute: activation checkpointing.
        checkpoints: also time writing them.
    """

    shape: str
    method: str
    context: int
    windows: int
    steps: int
    evidence: EvidenceKind = "bfloat16"
    bf16: bool = False
    recompute: bool = False
    checkpoints: bool = False


def measure(case: Case, gang: Gang, wire: Wire, device: torch.device, folder: Path) -> dict[str, Any]:
    """Everything that this rank can say about a case; `folder` is one for all ranks."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    shape = SHAPES[case.shape]
    teacher = shape.model(case.context, device, dtype).eval().requires_grad_(False)
    student = shape.model(case.context, device, dtype).eval()
    plan = plan_conversion(student, 128)
    ids = torch.randint(
        0, shape.vocabulary, (8 * case.windows, case.context), generator=torch.Generator().manual_seed(1)
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    method = partial(_kbop, folder=folder) if case.method == "kbop" else _latent
    found = method(case, (student, teacher), plan, ids, gang, wire)
    found |= {"weights": plan.weights, "tokens_per_s": case.windows * case.context / found["step_s"]}
    if device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated(device)
        found["mfu"] = _utilization(student, shape, case, found["tokens_per_s"], gang.size, device)
    return found


def _utilization(
    student: nn.Module, shape: Shape, case: Case, tokens_per_s: float, ranks: int, device: torch.device
) -> float | None:
    peak = peak_flops(torch.cuda.get_device_name(device))
    outside = sum(p.numel() for p in student.parameters() if p.dim() == 1) + shape.vocabulary * shape.hidden
    size = ModelSize(block_weights(shape) + outside, shape.layers, shape.hidden)
    needed = flops_per_token(size, case.context, live_teacher=True)
    return None if peak is None else needed * tokens_per_s / (peak * ranks)


def block_weights(shape: Shape) -> int:
    """Weights of the blocks' linear layers."""
    kv = shape.hidden * shape.kv_heads // shape.heads
    return shape.layers * (2 * shape.hidden * (shape.hidden + kv) + 3 * shape.hidden * shape.ffn)


def _kbop(
    case: Case, models: Models, plan: ConversionPlan, ids: Tensor, gang: Gang, wire: Wire, folder: Path
) -> dict[str, Any]:
    student, teacher = models
    convert_plain(student, plan, trainable=True)
    per_rank = case.windows // gang.size
    layout = StepLayout(case.context, case.windows, gang.size, per_rank)
    total = WARMUP + case.steps + 2
    config = TrainConfig(total, evidence=case.evidence, activation_checkpointing=case.recompute)
    run = start_run(student, teacher, WindowsInMemory(ids, 0), config, layout, gang, Phases(time.perf_counter, _settle))
    flips: list[float] = []
    run.kbop.step = partial(_timed, run.kbop.step, wire, flips)  # type: ignore[method-assign]
    steps = train(run, range(total))
    seconds = _steps(lambda: next(steps), case.steps, wire)
    found = {
        "step_s": statistics.median(seconds),
        "flip_s": statistics.median(flips[WARMUP:]),
        "state_bytes": _kbop_state(run),
        "wire_signs": wire.total("signs") / case.steps,
        "wire_other": wire.total("other") / case.steps,
    }
    metrics, found["extra_bytes"] = _peak_over_plain(run, lambda: next(steps))
    largest = max(entry.out_features * entry.in_features for entry in plan.binary)
    found |= {"phases": dict(metrics.seconds), "largest_gradient": 4 * largest}
    if case.checkpoints:
        found |= _checkpoints(run, folder)
    run.engine.close()
    return found


def _timed(step: Callable[[], Any], wire: Wire, seconds: list[float]) -> Any:
    """KBOP's step, its time and its bytes apart from the engine's."""
    began = time.perf_counter()
    with wire.labelled("signs"):
        result = step()
    _settle()
    seconds.append(time.perf_counter() - began)
    return result


def _settle() -> None:
    """Wait for the GPU: what it has been asked for before belongs to the phase before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _kbop_state(run: Run) -> dict[str, int]:
    """Bytes of live tensors that the binary weights cause between two steps, by kind."""
    kinds = {"bits": 0, "evidence": 0, "moments": 0}
    for shard in run.kbop.shards.values():
        kinds["bits"] += shard.layer.weight.untyped_storage().nbytes()
        for part, piece in shard.slices().items():
            kind = "evidence" if part.startswith("evidence") else "moments"
            kinds[kind] += piece.rows.untyped_storage().nbytes()
    return kinds


def _peak_over_plain(run: Run, step: Callable[[], Any]) -> tuple[Any, int]:
    """A step's metrics, and its peak of live bytes above that of a step that drops every gradient and flips nothing."""
    sinks = {name: shard.layer.gradient_sink for name, shard in run.kbop.shards.items()}
    flip = run.kbop.step
    for shard in run.kbop.shards.values():
        shard.layer.gradient_sink = _drop
    run.kbop.step = _no_flips  # type: ignore[method-assign]
    with LiveTensors() as plain:
        step()
    run.kbop.step = flip  # type: ignore[method-assign]
    for name, shard in run.kbop.shards.items():
        shard.layer.gradient_sink = sinks[name]
    with LiveTensors() as whole:
        metrics = step()
    return metrics, whole.peak - plain.peak


def _drop(_gradient: Tensor) -> None:
    return None


def _no_flips() -> FlipStats:
    return FlipStats({}, {}, 0)


def _checkpoints(run: Run, folder: Path) -> dict[str, float]:
    """Seconds that training stands still for a checkpoint, and for one that is waited for."""
    writer, began = StateWriter(folder / "beside", run.gang), time.perf_counter()
    writer.save(1, run.engine, run.kbop)
    copied = time.perf_counter() - began
    writer.wait()
    began = time.perf_counter()
    save_state(folder / "waited", 1, run.engine, run.kbop, run.gang)
    return {"checkpoint_copy_s": copied, "checkpoint_whole_s": time.perf_counter() - began}


def _latent(case: Case, models: Models, plan: ConversionPlan, ids: Tensor, gang: Gang, wire: Wire) -> dict[str, Any]:
    student, teacher = models
    layers = convert_latent(student, plan)
    student.requires_grad_(True)
    if case.recompute:
        recompute_blocks(student)
    per_rank = case.windows // gang.size
    config = EngineConfig(per_rank, 1, zero_stage=2, bf16=case.bf16)
    engine = Engine(student, [{"params": list(student.parameters()), "lr": 1e-3}], config, gang, 600.0)
    device = next(student.parameters()).device
    batches = _batches(ids, case.windows, gang)

    def step() -> None:
        batch = next(batches).to(device)
        engine.backward(distillation_loss(engine(batch), teacher_logits(teacher, batch)))
        engine.step()

    seconds = _steps(step, case.steps, wire)
    found = {
        "step_s": statistics.median(seconds),
        "wire_signs": wire.total("other") / case.steps,
        "state_bytes": {"latent and AdamW": _latent_state(engine, layers)},
    }
    engine.close()
    return found


def _latent_state(engine: Engine, layers: dict[str, LatentLinear]) -> int:
    """Bytes between two steps because of the binary weights: the working copy, and this rank's masters and moments."""
    state = engine.state()
    ours = {f"{kind}.{name}.latent" for name in layers for kind in ("parameter", "exp_avg", "exp_avg_sq")}
    held = sum(state[name].rows.nbytes for name in ours & state.keys())
    return held + sum(layer.latent.nbytes for layer in layers.values())


def _batches(ids: Tensor, windows: int, gang: Gang) -> Iterator[Tensor]:
    per_rank = windows // gang.size
    while True:
        for batch in ids.split(windows):
            yield batch[gang.rank * per_rank : (gang.rank + 1) * per_rank]


def _steps(step: Callable[[], Any], count: int, wire: Wire) -> list[float]:
    seconds = []
    for number in range(WARMUP + count):
        if number == WARMUP:
            wire.clear()
        began = time.perf_counter()
        step()
        _settle()
        seconds.append(time.perf_counter() - began)
    return seconds[WARMUP:]


def main(description: str, out: str) -> None:
    torch.set_num_threads(1)
    wire = Wire()
    kind = "cuda" if torch.cuda.is_available() and os.environ.get("SCALING_DEVICE") == "cuda" else "cpu"
    with gang_of_ranks(kind, 600.0) as gang:
        device = torch.device("cpu" if kind == "cpu" else f"cuda:{torch.cuda.current_device()}")
        try:
            found = measure(Case(**json.loads(description)), gang, wire, device, Path(out).parent)
        except torch.OutOfMemoryError as error:
            found = {"out_of_memory": str(error).splitlines()[0]}
    Path(out).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
