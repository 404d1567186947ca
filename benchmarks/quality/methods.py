"""Owns what competes: each method is a function from a task and a configuration to a `Student`. Trains nothing.

Calibrated (nothing end to end): `plain`, `gptq`, `arb`, `bnn_init`, `quick` (BNN Init, then block-wise). Trained, all
from the same text in the same order: latent weights with STE (`ste`, `ste_quick`, `onebit`, `binarymos`); from
`quick`'s signs, other latent-free rules (`bop`, `bold`, `fire_spend`), ours (`scales_only`, `kbop`) and `ablation`: one
knob of our rule changed (ablation.py); from plain signs, `paper`: KBOP as published, one scale a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.quality.ablation import ShareRule
from benchmarks.quality.columns import ColumnScales
from benchmarks.quality.tasks import Task
from benchmarks.quality.training import RunConfig, Student
from kbop_core.baselines.arb import arb_layer
from kbop_core.baselines.binarymos import convert_binarymos
from kbop_core.baselines.bits import NUMBER_BITS, stored_bits
from kbop_core.baselines.flip_rules import AccumulateFireSpend, Bold, Bop, PaperKBOP, Rule
from kbop_core.baselines.gptq import gptq_layer
from kbop_core.baselines.latent import LatentLinear, convert_latent
from kbop_core.baselines.onebit import convert_onebit
from kbop_core.convert import binary_layers, convert_plain, linear_weight
from kbop_core.init.blockwise import BlockEffort
from kbop_core.init.pretrained import InitEffort
from kbop_core.init.random import random_init
from kbop_core.kbop import KBOP
from kbop_core.layers import BinaryLinear
from kbop_core.schedules import FlipSchedule

Method = Callable[[Task, RunConfig], Student]
#: fp32 latent weight and AdamW's two averages of it.
LATENT_STATE_BYTES = 12.0
#: Bits, and the float32 average a dense baseline rule keeps.
RULE_STATE_BYTES = 4.0 + 1 / 8


def _signs(layer: nn.Module) -> int:
    if isinstance(layer, BinaryLinear):
        return layer.signs_count
    latent = layer.get_parameter("latent")
    return latent.numel()


def _student(model: nn.Module, state_bytes: float, layers: Mapping[str, nn.Module]) -> Student:
    weights = sum(_signs(layer) for layer in layers.values())
    bits = sum(stored_bits(layer) for layer in layers.values()) / weights
    model.requires_grad_(True)
    return Student(model, bits, state_bytes)


# -- calibrated ---------------------------------------------------------------------------------------------------


def plain(task: Task, config: RunConfig) -> Student:
    """sign(w) × mean|w| of the group."""
    model = task.fresh_model()
    return _student(model, 0.0, convert_plain(model, task.plan, trainable=True))


def _calibrated(effort: InitEffort, task: Task, config: RunConfig) -> Student:
    model = task.initialised(config.seed, effort)
    return _student(model, 0.0, binary_layers(model))


def quick(task: Task, config: RunConfig) -> Student:
    """BNN Init, then blocks reconstructed for `steps` steps each."""
    steps = config.options.get("steps", BlockEffort().steps)
    return _calibrated(InitEffort(blockwise=BlockEffort(steps)), task, config)


# -- latent weights -----------------------------------------------------------------------------------------------


def ste(task: Task, config: RunConfig) -> Student:
    """Latent weights, group scales, from plain binarization."""
    model = task.fresh_model()
    return _student(model, LATENT_STATE_BYTES, convert_latent(model, task.plan))


def ste_quick(task: Task, config: RunConfig) -> Student:
    """The same from where ours starts: `quick`, its signs on the magnitudes of the pretrained weights."""
    student, started = ste(task, config), task.started(config.seed, BlockEffort())
    layers = binary_layers(started)
    with torch.no_grad():
        for name, ours in layers.items():
            layer = student.model.get_submodule(name)
            assert isinstance(layer, LatentLinear)
            layer.latent.copy_(ours.signs() * linear_weight(task.teacher.get_submodule(name)).abs())
            layer.scale.copy_(ours.weight_scale)
            if layer.bias is not None and ours.bias is not None:
                layer.bias.copy_(ours.bias)
        for name, parameter in started.named_parameters():
            if name.rpartition(".")[0] not in layers:
                student.model.get_parameter(name).copy_(parameter)
    return student


def onebit(task: Task, config: RunConfig) -> Student:
    """Row × column scales from the rank-one decomposition of |W|."""
    model = task.fresh_model()
    return _student(model, LATENT_STATE_BYTES, convert_onebit(model, task.plan))


def binarymos(task: Task, config: RunConfig) -> Student:
    """Four experts of row and column scales, mixed per token."""
    model = task.fresh_model()
    return _student(model, LATENT_STATE_BYTES, convert_binarymos(model, task.plan, seed=config.seed))


# -- latent-free --------------------------------------------------------------------------------------------------


def _flipping(layers: Mapping[str, BinaryLinear], only: str) -> list[str]:
    """Names of the layers that flip: "all", those of "attention" or "mlp", of the "early" or the "late" half."""
    names = list(layers)
    half = len(names) // 2
    parts = {"all": names, "early": names[:half], "late": names[half:]}
    parts |= {"attention": [n for n in names if "attn" in n], "mlp": [n for n in names if "attn" not in n]}
    return parts[only]


class _DenseFlipper:
    """Runs one `Rule` per layer on dense signs and counts reversals."""

    def __init__(self, layers: Mapping[str, BinaryLinear], rule: Callable[[], Rule], only: str) -> None:
        self.flipping = _flipping(layers, only)
        self.layers, self.rules = layers, {name: rule() for name in layers}
        for place, own in enumerate(self.rules.values()):
            if isinstance(own, ShareRule):
                own.phase = place % own.every
        self.signs = {name: layer.signs() for name, layer in layers.items()}
        self.flipped = {name: torch.zeros_like(s, dtype=torch.bool) for name, s in self.signs.items()}
        self.gradients: dict[str, Tensor] = {}
        self.steps = 0
        for name, layer in layers.items():
            layer.gradient_sink = partial(self.gradients.__setitem__, name)

    def step(self) -> tuple[int, int]:
        flips = back = 0
        for name, layer in self.layers.items():
            gradient = self.gradients.pop(name)
            if name not in self.flipping:
                continue
            mask = self.rules[name].flips(self.signs[name], gradient, self.steps)
            self.signs[name].masked_fill_(mask, 0.0).add_(torch.where(mask, -layer.signs(), 0.0))
            layer.set_signs(self.signs[name])
            flips, back = flips + int(mask.sum()), back + int((mask & self.flipped[name]).sum())
            self.flipped[name] |= mask
        self.steps += 1
        return flips, back


class _KbopFlipper:
    """The product's own optimizer; a flip of a weight that has flipped before is a reversal."""

    def __init__(self, layers: Mapping[str, BinaryLinear], kbop: KBOP) -> None:
        self.layers, self.kbop = layers, kbop
        self.before = {name: layer.signs(torch.int8) for name, layer in layers.items()}
        self.flipped = {name: torch.zeros_like(s, dtype=torch.bool) for name, s in self.before.items()}

    def step(self) -> tuple[int, int]:
        flips, back = sum(self.kbop.step().flips.values()), 0
        for name, layer in self.layers.items():
            now = layer.signs(torch.int8)
            mask = now != self.before[name]
            back += int((mask & self.flipped[name]).sum())
            self.flipped[name] |= mask
            self.before[name] = now
        return flips, back


def _start(task: Task, config: RunConfig) -> Student:
    """The binary student before its first step, as the options `init` and `columns` (columns.py) say.

    `init`: blockwise (the product's), bnn, plain; random or random_unit signs (BNN Init's scales, or 1) in
    the teacher's model; nothing or nothing_unit: the same in a model without anything of the teacher's.
    """
    kind = config.options.get("init", "blockwise")
    if kind in ("bnn", "blockwise"):
        effort = BlockEffort(config.options.get("blockwise_steps", BlockEffort().steps))
        model = task.started(config.seed, effort if kind == "blockwise" else None)
    else:
        model = task.untrained_model(config.seed) if kind.startswith("nothing") else task.fresh_model()
        layers = convert_plain(model, task.plan, trainable=True)
        generator = torch.Generator().manual_seed(config.seed)
        for layer in layers.values() if kind != "plain" else ():
            random_init(layer, generator)
            if kind.endswith("_unit"):
                layer.weight_scale.data.fill_(1.0)
    layers = binary_layers(model)
    columns = config.options.get("columns")
    scales = ColumnScales(model, layers, columns, task.train_NT[:1]) if columns else None
    student = _student(model, 0.0, layers)
    if scales:
        student.finish = scales.fold
    if columns == "own":
        student.bits += NUMBER_BITS * sum(layer.in_features for layer in layers.values()) / task.plan.weights
    return student


def _with_rule(rule: Callable[[RunConfig], Rule], task: Task, config: RunConfig) -> Student:
    student = _start(task, config)
    only = config.options.get("only", "all")
    student.flipper = _DenseFlipper(binary_layers(student.model), lambda: rule(config), only)
    student.state_bytes = RULE_STATE_BYTES + (4.0 if config.method == "fire_spend" else 0.0)  # average and energy
    return student


def paper(task: Task, config: RunConfig) -> Student:
    """KBOP as in the paper: threshold from mean and deviation of a layer, and one scale a layer, at first mean |W|.

    The paper has no start from pretrained weights but their signs: BNN Init's and `quick`'s scales are of groups.
    """
    student = _start(task, replace(config, options={"init": "plain"}))
    layers = binary_layers(student.model)
    for layer in layers.values():
        layer.weight_scale.data.fill_(float(layer.weight_scale.detach().mean()))
        layer.weight_scale.register_hook(lambda grad: grad.mean().expand_as(grad))  # equal gradients keep them equal
    student.flipper = _DenseFlipper(layers, lambda: PaperKBOP(deviations=config.lr), "all")
    student.bits, student.state_bytes = 1.0 + NUMBER_BITS * len(layers) / task.plan.weights, RULE_STATE_BYTES
    return student


def scales_only(task: Task, config: RunConfig) -> Student:
    """The start of ours, then AdamW on everything but the signs."""
    student = _start(task, config)
    student.state_bytes = 1 / 8
    return student


def kbop(task: Task, config: RunConfig) -> Student:
    """Ours, with the product's optimizer and defaults but for the flips' rate `lr`."""
    student = _start(task, config)
    layers = binary_layers(student.model)
    optimizer = KBOP(layers, _flips(config), evidence=config.options.get("evidence", "bfloat16"))
    student.flipper = _KbopFlipper(layers, optimizer)
    student.state_bytes = optimizer.state_bytes() / task.plan.weights
    return student


def _flips(config: RunConfig) -> FlipSchedule:
    """Over the run, or all but its last share `finish`: then scales and norms finish alone."""
    steps = config.steps - round(float(config.options.get("finish", 0.0)) * config.steps)
    return FlipSchedule(config.lr, steps, config.warmup_steps)


#: Options of an ablation that change something else than the flip rule.
NOT_OF_THE_RULE = (
    *("init", "blockwise_steps", "columns", "only", "finish", "average", "late_batch"),
    *("distill", "hidden", "cross_entropy", "temperature", "top_k"),
)


def _ablation(config: RunConfig) -> Rule:
    knobs = {k: v for k, v in config.options.items() if k not in NOT_OF_THE_RULE}
    return ShareRule(_flips(config), **knobs)


METHODS: dict[str, Method] = {
    "plain": plain,
    "gptq": partial(_calibrated, InitEffort(gptq_layer)),
    "arb": partial(_calibrated, InitEffort(arb_layer)),
    "bnn_init": partial(_calibrated, InitEffort()),
    "quick": quick,
    "scales_only": scales_only,
    "ste": ste,
    "ste_quick": ste_quick,
    "onebit": onebit,
    "binarymos": binarymos,
    "bop": partial(_with_rule, lambda c: Bop(adaptivity=0.02, threshold=c.lr)),
    "bold": partial(_with_rule, lambda c: Bold(rate=c.lr)),
    "fire_spend": partial(_with_rule, lambda c: AccumulateFireSpend(threshold=c.lr)),
    "paper": paper,
    "kbop": kbop,
    "ablation": partial(_with_rule, _ablation),
}
