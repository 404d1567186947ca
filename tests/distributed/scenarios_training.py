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
from kbop_core.engine import Engine, EngineConfig, barrier, share_frozen
from kbop_core.errors import KbopError
from kbop_core.hf import load_lazily
from kbop_core.kbop import KBOP
from kbop_core.layers import BinaryLinear
from kbop_core.loop import Run, StepLayout, TrainConfig, start_run, train
from kbop_core.schedules import FlipSchedule
from kbop_core.shard import Gang
from kbop_core.target_cache import TargetCache
from kbop_core.teacher import CachedTeacher, LiveTeacher
from kbop_core.training_state import checkpoint_folder, load_state, newest_state, save_state
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


def dyadic_engine(gang: Gang, folder: Path, micro_steps: int = 1, accumulates: bool = False) -> dict[str, Any]:
    """Five steps on two samples of four tokens: one rank takes both, of two ranks each takes one.

    Args:
        accumulates: each step's evidence is its own, and in float32, since bfloat16 rounds at every micro-step.
    """
    model, rng = WholeNumbers(), torch.Generator().manual_seed(1)
    layers = {"first": model.first, "second": model.second}
    scales = [layer.weight_scale for layer in layers.values()]
    batch = 2 // gang.size // micro_steps
    engine = Engine(model, [{"params": scales, "lr": 0.0}], EngineConfig(batch, micro_steps, clip=0.0), gang, 60.0)
    gang = replace(gang, wire=torch.float32)
    momentum = 0.0 if accumulates else 0.98
    kbop = KBOP(layers, FlipSchedule(0.1, 5, 1), momentum=momentum, micro_steps=micro_steps, gang=gang)
    if accumulates:
        for shard in kbop.shards.values():
            shard.evidence.stored = shard.evidence.stored.float()
    bits, flips = [], []
    for _ in range(5):
        ids = torch.randint(0, 16, (2, 4), generator=rng)
        targets = torch.randint(-50, 51, (2, 4, 8), generator=rng).float()
        for micro_step in range(micro_steps):
            first = (micro_step * gang.size + gang.rank) * batch
            mine = slice(first, first + batch)
            engine.backward((engine(ids[mine]) - targets[mine]).square().sum() / (batch * 32))
            if micro_step < micro_steps - 1:
                engine.step()
        flips.append(dict(kbop.step().flips))
        engine.step()
        bits.append({name: layer.weight.clone() for name, layer in layers.items()})
    engine.close()
    rows = {name: shard.moments.row for name, shard in kbop.shards.items()}
    return {"bits": bits, "flips": flips, "scales": [s.detach().clone() for s in scales], "rows": rows}


def accumulated(gang: Gang, folder: Path) -> dict[int, dict[str, Any]]:
    """The same with both samples at once, and one after the other."""
    return {micro_steps: dyadic_engine(gang, folder, micro_steps, accumulates=True) for micro_steps in (1, 2)}


# -- training and its checkpoints -------------------------------------------------------------------------------------


def begin(
    gang: Gang,
    windows: Tensor | None = None,
    config: TrainConfig = CONFIG,
    make: Callable[[int], PreTrainedModel] = make_llama,
    teacher: Any = None,
) -> Run:
    student, teacher = make(0), make(0) if teacher is None else teacher
    convert_plain(student, plan_conversion(student, 4), trainable=True)
    layout = StepLayout(16, WINDOWS, gang.size, 1 if gang.size == 2 else WINDOWS // gang.size)
    source = WindowsInMemory(make_windows(13, 16) if windows is None else windows, seed=0)
    return start_run(student, teacher, source, config, layout, gang)


def snapshot(run: Run) -> dict[str, Tensor]:
    """Bits, evidence with its moments and unit, and every full-precision parameter of this rank."""
    values = {f"bits.{n}": s.layer.weight for n, s in run.kbop.shards.items()}
    values |= {f"evidence.{p}.{n}": t.rows for n, s in run.kbop.shards.items() for p, t in s.slices().items()}
    values |= {"evidence.unit": torch.tensor(run.kbop.unit, dtype=torch.float64)}
    with run.engine.whole_parameters():
        values |= dict(run.engine._engine.module.named_parameters())
        return {name: t.detach().clone() for name, t in values.items()}


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
    newest = newest_state(checkpoints, warnings.append)
    assert newest is not None
    start = load_state(newest, again.engine, again.kbop)
    loaded = snapshot(again)
    more = [metrics.loss for metrics in train(again, range(start, 6))]
    resumed = snapshot(again)
    again.engine.close()
    states = {"saved": saved, "loaded": loaded, "went_on": went_on, "resumed": resumed}
    return states | {"start": start, "losses": losses, "resumed_losses": more, "warnings": warnings}


def zero_stages(gang: Gang, folder: Path) -> dict[int, dict[str, Any]]:
    """The same with the full-precision side whole, and with its gradients, and the parameters, sharded too."""
    return {stage: resume(gang, folder, replace(CONFIG, zero_stage=stage), f"zero-{stage}") for stage in (0, 2, 3)}


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
    teacher = run.teacher.model
    teacher.lm_head.weight = nn.Parameter(teacher.lm_head.weight.clone())  # no longer the embedding
    teacher.model.embed_tokens.weight[0] = torch.nan
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
    for stage in (0, 1, 2, 3):
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


def full_disk(gang: Gang, folder: Path) -> dict[str, Any]:
    """No room for the rank's file; afterwards there is room again."""
    run, error, checkpoints = begin(gang), "none", folder / "full"
    save_state(checkpoints, 1, run.engine, run.kbop, gang)
    try:
        with largest_file(100):
            save_state(checkpoints, 2, run.engine, run.kbop, gang)
    except Exception as caught:
        error = type(caught).__name__
    newest = newest_state(checkpoints, lambda _: None)
    save_state(checkpoints, 3, run.engine, run.kbop, gang)
    run.engine.close()
    names = sorted(p.name for p in checkpoints.iterdir())
    return {"error": error, "newest": newest and newest.name, "names_after": names}


#: Number of ranks → whose checkpoint they go on from, and the ZeRO stage they use.
MOVES = {2: (None, 1), 1: (2, 0), 3: (1, 3)}


def moved_state(gang: Gang, folder: Path) -> None:
    """Two ranks train and save, one rank takes that and saves it again, then three do."""
    before, stage = MOVES[gang.size]
    run = begin(gang, config=replace(CONFIG, zero_stage=stage))
    if before is None:
        list(train(run, range(2)))
    else:
        assert load_state(checkpoint_folder(folder.parent / f"moved-{before}", 2), run.engine, run.kbop) == 2
    save_state(folder.parent / f"moved-{gang.size}", 2, run.engine, run.kbop, gang)
    if before is not None:
        list(train(run, range(2, 3)))  # and it trains
    run.engine.close()


def recompute(gang: Gang, folder: Path) -> dict[int, list[Any]]:
    """Two steps with and without activation checkpointing, for every ZeRO stage."""
    found = {}
    for stage in range(4):
        found[stage] = []
        for recomputed in (False, True):
            run = begin(gang, config=replace(CONFIG, zero_stage=stage, activation_checkpointing=recomputed))
            losses = [metrics.loss for metrics in train(run, range(2))]
            found[stage].append((losses, snapshot(run)))
            run.engine.close()
    return found


@contextmanager
def deepspeed_told(part: str, **settings: Any) -> Iterator[None]:
    """Within the block, engines get these settings in a part of DeepSpeed's configuration."""
    usual = EngineConfig.to_deepspeed

    def to_deepspeed(config: EngineConfig) -> dict[str, Any]:
        told = usual(config)
        return told | {part: told[part] | settings}

    EngineConfig.to_deepspeed = to_deepspeed  # type: ignore[method-assign]
    try:
        yield
    finally:
        EngineConfig.to_deepspeed = usual  # type: ignore[method-assign]


def partitioned(gang: Gang, folder: Path) -> dict[str, Any]:
    """ZeRO stage 3 that keeps no parameter whole, as with large ones; saved, loaded, and gone on with."""
    with deepspeed_told("zero_optimization", stage3_param_persistence_threshold=0):
        return resume(gang, folder, replace(CONFIG, zero_stage=3), "partitioned")


def half_precision(gang: Gang, folder: Path) -> dict[int, dict[str, Any]]:
    """The full-precision side in bfloat16 with float32 masters, as on GPUs, for every ZeRO stage."""
    with deepspeed_told("bf16", enabled=True):
        return {stage: resume(gang, folder, replace(CONFIG, zero_stage=stage), f"half-{stage}") for stage in range(4)}


def teachers(gang: Gang, folder: Path) -> dict[str, list[float]]:
    """Losses of three steps with the same teacher in every place it can be."""
    if gang.rank == 0:
        make_llama(0).save_pretrained(folder / "teacher")
    barrier(gang)
    windows = make_windows(13, 16)
    cache = TargetCache(folder / "targets", range(13))
    cache.write(gang, lambda numbers: windows[list(numbers)], LiveTeacher(make_llama(0)).log_probs, 2)
    barrier(gang)
    places: dict[str, Callable[[], Any]] = {
        "resident": lambda: make_llama(0),
        "sharded": lambda: LiveTeacher(share_frozen(make_llama(0))),
        "sharded from disk": lambda: LiveTeacher(
            share_frozen(load_lazily(str(folder / "teacher"), None, torch.float32, torch.device("cpu")))
        ),
        "offloaded": lambda: load_lazily(str(folder / "teacher"), None, torch.float32, torch.device("cpu")),
        "cached": lambda: CachedTeacher(cache),
    }
    losses = {}
    for place, make in places.items():
        run = begin(gang, teacher=make())
        losses[place] = [metrics.loss for metrics in train(run, range(3))]
        run.engine.close()
    return losses


SCENARIOS = {
    f.__name__: f
    for f in (
        dyadic_engine,
        accumulated,
        resume,
        zero_stages,
        dropout,
        nan_loss,
        nan_norm,
        full_disk,
        moved_state,
        recompute,
        partitioned,
        half_precision,
        teachers,
    )
}
