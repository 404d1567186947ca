"""What ranks do with the whole path: DeepSpeed engine, binary layers, flips, training checkpoints."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tiny import make_gpt2_with_dropout, make_llama, make_windows
from torch import Tensor, nn
from transformers import PreTrainedModel

from kbop_core.convert import convert_plain, plan_conversion
from kbop_core.engine import Engine, EngineConfig
from kbop_core.errors import KbopError
from kbop_core.kbop import KBOP
from kbop_core.layers import BinaryLinear
from kbop_core.loop import Run, StepLayout, TrainConfig, start_run, train
from kbop_core.schedules import FlipSchedule
from kbop_core.shard import Gang
from kbop_core.training_state import load_state, newest_state, save_state
from kbop_core.window_source import WindowsInMemory

CONFIG = TrainConfig(steps=6, flip_rate=0.05, warmup=0.2, zero_stage=1, timeout_s=60.0)
WINDOWS = 6  # a step: divides by one, two and three ranks


# -- exactly summable gradients ---------------------------------------------------------------------------------------


class WholeNumbers(nn.Module):
    """Two binary layers, whole-number inputs, scales of 1: every number up to the gradients is exact in float32."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.register_buffer("inputs", torch.randint(-1, 2, (16, 32), generator=rng).float())
        self.first = BinaryLinear(32, 16, False, 32, trainable=True)
        self.second = BinaryLinear(16, 8, False, 16, trainable=True)
        for layer in (self.first, self.second):
            layer.set_signs(torch.randn(layer.out_features, layer.in_features, generator=rng))

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.second(self.first(self.inputs[input_ids]).relu()))


def dyadic_engine(gang: Gang, folder: Path) -> dict[str, Any]:
    """Five steps on two samples of four tokens: one rank takes both at once, of two ranks each takes one."""
    model, rng = WholeNumbers(), torch.Generator().manual_seed(1)
    layers = {"first": model.first, "second": model.second}
    scales = [layer.weight_scale for layer in layers.values()]
    batch = 2 // gang.size
    engine = Engine(model, [{"params": scales, "lr": 0.0}], EngineConfig(batch, 1, clip=0.0), 60.0)
    kbop = KBOP(layers, FlipSchedule(0.1, 5, 1), momentum=0.98, gang=gang)
    bits, flips = [], []
    for _ in range(5):
        ids = torch.randint(0, 16, (2, 4), generator=rng)
        targets = torch.randint(-50, 51, (2, 4, 8), generator=rng).float()
        mine = slice(gang.rank * batch, (gang.rank + 1) * batch)
        engine.backward((engine(ids[mine]) - targets[mine]).square().sum() / (batch * 32))
        flips.append(dict(kbop.step().flips))
        engine.step()
        bits.append({name: layer.weight.clone() for name, layer in layers.items()})
    engine.close()
    return {"bits": bits, "flips": flips, "scales": [s.detach().clone() for s in scales]}


# -- training and its checkpoints -------------------------------------------------------------------------------------


def begin(
    gang: Gang,
    windows: Tensor | None = None,
    config: TrainConfig = CONFIG,
    make: Callable[[int], PreTrainedModel] = make_llama,
) -> Run:
    teacher, student = make(0), make(0)
    convert_plain(student, plan_conversion(student, 4), trainable=True)
    layout = StepLayout(16, WINDOWS, gang.size, 1 if gang.size == 2 else WINDOWS // gang.size)
    source = WindowsInMemory(make_windows(13, 16) if windows is None else windows, seed=0)
    return start_run(student, teacher, source, config, layout, gang)


def snapshot(run: Run) -> dict[str, Tensor]:
    """Bits, evidence with its moments and unit, and every full-precision parameter of this rank."""
    model = run.engine._engine.module
    values = {f"bits.{n}": s.layer.weight for n, s in run.kbop.shards.items()}
    values |= {f"evidence.{p}.{n}": t for n, s in run.kbop.shards.items() for p, t in s.tensors().items()}
    values |= {"evidence.unit": torch.tensor(run.kbop.unit, dtype=torch.float64)}
    return {name: t.detach().clone() for name, t in {**values, **dict(model.named_parameters())}.items()}


def resume(gang: Gang, folder: Path, config: TrainConfig = CONFIG, name: str = "checkpoints") -> dict[str, Any]:
    """Train, save after steps 1, 2 and 3, go on; then start anew from the newest checkpoint and go on again."""
    checkpoints, run = folder / name, begin(gang, config=config)
    losses = []
    for metrics in train(run, range(3)):
        losses.append(metrics.loss)
        save_state(checkpoints, metrics.step + 1, run.engine, run.kbop, gang)
    saved = snapshot(run)
    losses += [metrics.loss for metrics in train(run, range(3, 6))]
    went_on = snapshot(run)
    run.engine.close()

    again, warnings = begin(gang, config=config), []
    newest = newest_state(checkpoints, gang.size, warnings.append)
    assert newest is not None
    start = load_state(newest, again.engine, again.kbop, gang)
    loaded = snapshot(again)
    more = [metrics.loss for metrics in train(again, range(start, 6))]
    resumed = snapshot(again)
    again.engine.close()
    states = {"saved": saved, "loaded": loaded, "went_on": went_on, "resumed": resumed}
    return states | {"start": start, "losses": losses, "resumed_losses": more, "warnings": warnings}


def zero_stages(gang: Gang, folder: Path) -> dict[int, dict[str, Any]]:
    """The same with the full-precision side whole, and with its gradients sharded too."""
    return {stage: resume(gang, folder, replace(CONFIG, zero_stage=stage), f"zero-{stage}") for stage in (0, 2)}


def dropout(gang: Gang, folder: Path) -> list[list[float]]:
    """Losses of two runs of a model whose config asks for dropout; the global dice differ."""
    losses = []
    for seed in range(2):
        run = begin(gang, make=make_gpt2_with_dropout)
        torch.manual_seed(seed)
        losses.append([metrics.loss for metrics in train(run, range(3))])
        run.engine.close()
    return losses


def nan_loss(gang: Gang, folder: Path) -> dict[str, Any]:
    """In the second step a window of rank 1 alone holds a token whose teacher is broken."""
    windows = make_windows(13, 16)
    run = begin(gang, windows=windows)
    run.teacher.lm_head.weight = nn.Parameter(run.teacher.lm_head.weight.clone())  # no longer the embedding
    run.teacher.model.embed_tokens.weight[0] = torch.nan
    place = run.layout.places(1, run.layout.micro_steps - 1, 1)[0]
    windows[run.windows.numbers(range(place, place + 1)), 3] = 0
    steps = train(run, range(6))
    next(steps)
    before = snapshot(run)
    try:
        next(steps)
        result: dict[str, Any] = {"error": None}
    except KbopError as error:
        result = {"error": type(error).__name__, "message": str(error)}
    after = snapshot(run)
    run.engine.close()
    changed = [n for n in before if not n.startswith("evidence.") and not torch.equal(before[n], after[n])]
    return result | {"changed": changed}


def nan_norm(gang: Gang, folder: Path) -> dict[int, str]:
    """The loss and the signs' gradients are finite, and on the last rank a norm's gradient is not."""
    errors = {}
    for stage in (0, 1, 2):
        run = begin(gang, config=replace(CONFIG, zero_stage=stage))
        if gang.rank == gang.size - 1:
            run.engine._engine.module.model.norm.weight.register_hook(lambda gradient: gradient * torch.nan)
        try:
            next(train(run, range(6)))
            errors[stage] = "none"
        except KbopError as error:
            errors[stage] = type(error).__name__
        run.engine.close()
    return errors


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk that takes no file beyond `size` bytes."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def full_disk(gang: Gang, folder: Path) -> dict[str, dict[str, Any]]:
    """No room for the rank's own file, then room for it and not for DeepSpeed's; afterwards there is room again."""
    run, results = begin(gang), {}
    for kind, size in {"rank": 100, "engine": 14_000}.items():
        checkpoints, error = folder / f"full-{kind}", "none"
        save_state(checkpoints, 1, run.engine, run.kbop, gang)
        try:
            with largest_file(size):
                save_state(checkpoints, 2, run.engine, run.kbop, gang)
        except Exception as caught:
            error = type(caught).__name__
        newest = newest_state(checkpoints, gang.size, lambda _: None)
        parts = [p for p in checkpoints.glob(".*.parts/*.safetensors") if p.stat().st_size > size // 4]
        save_state(checkpoints, 3, run.engine, run.kbop, gang)
        names = sorted(p.name for p in checkpoints.iterdir())
        results[kind] = {
            "error": error,
            "newest": newest and newest.name,
            "whole": [p.name for p in parts],
            "names_after": names,
        }
    run.engine.close()
    return results


SCENARIOS = {f.__name__: f for f in (dyadic_engine, resume, zero_stages, dropout, nan_loss, nan_norm, full_disk)}
