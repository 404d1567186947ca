"""Owns which runs make which table. Runs nothing.

Rates are swept at the short budget with seed 0, each method by its validation perplexity on each task: the middle ones
first, then outwards until the best lies between two that are worse, or at an end of the range. Longer budgets and other
seeds take the winner. Ours is not swept: one set of defaults for all tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from benchmarks.quality.store import key
from benchmarks.quality.tasks import CALIBRATION_BATCH, CONTEXT
from benchmarks.quality.training import RunConfig
from jobs.spec import RECIPES
from kbop_core.init.blockwise import BlockEffort
from kbop_core.schedules import FLIP_RATE

SHORT, MEDIUM, LONG = 800_000, 4_000_000, 40_000_000
#: Of an ablation: half the short budget. With BLOCKWISE_TOKENS it makes a whole one.
ABLATION = 400_000
CALIBRATED = ("plain", "gptq", "arb", "bnn_init", "quick")
#: The latent peers', and those of a sweep that run first.
LATENT_RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)
FIRST_RATES = {1e-3, 2e-3, 5e-3}
#: Swept rate of each method: latent learning rates, thresholds, or rates as methods.py gives them to the method.
SWEEPS: dict[str, tuple[float, ...]] = {
    "ste": LATENT_RATES,
    "onebit": LATENT_RATES,
    "binarymos": LATENT_RATES,
    "ste_quick": LATENT_RATES,
    "bop": (1e-5, 1e-4),
    "bold": (0.02, 0.05),
    "fire_spend": (4.0, 16.0),
    "paper": (3.0, 4.0),
    "scales_only": (0.0,),
    "kbop": (FLIP_RATE,),
}
#: More than any row has weights: one scale a row.
ROW = 1 << 16
#: Starts from random signs, row → options: in the teacher's model, distilled; in one without anything of the teacher's,
#: from text alone.
TEXT_ALONE = {"distill": 0.0, "cross_entropy": 1.0}
SCRATCH: dict[str, dict[str, Any]] = {
    "random signs, BNN Init": {"init": "random"},
    "random signs, scales 1": {"init": "random_unit"},
    "nothing of the teacher, BNN Init": {"init": "nothing"} | TEXT_ALONE,
    "nothing of the teacher, scales 1": {"init": "nothing_unit"} | TEXT_ALONE,
}
#: Latent-weight methods; `ste_quick` has the start of ours, so that rule and start are told apart.
PEERS = ("ste", "ste_quick", "onebit", "binarymos")
SEEDS = (0, 1, 2)
#: Tokens that pass through each block while it is reconstructed; all are of the calibration text.
BLOCKWISE_TOKENS = BlockEffort().steps * CALIBRATION_BATCH * CONTEXT

Finished = Mapping[str, Mapping[str, Any]]


def calibrated(tasks: Iterable[str]) -> Iterator[RunConfig]:
    """Methods without training."""
    for task in tasks:
        yield from (RunConfig(task, method) for method in CALIBRATED)


def sweep(tasks: Iterable[str], tokens: int = SHORT, methods: Iterable[str] = SWEEPS) -> Iterator[RunConfig]:
    """Every rate of every method, seed 0."""
    names = list(methods)
    for method in names:
        for rate in SWEEPS[method]:
            yield from (RunConfig(task, method, tokens, lr=rate) for task in tasks)


def bracket(tasks: Iterable[str], methods: Iterable[str], done: Finished) -> Iterator[RunConfig]:
    """Rates to run at the short budget with seed 0: the first of each sweep, and the neighbours of the best so far.

    Call it again when they have run, until it names none that are not done.
    """
    places = list(tasks)
    for method in methods:
        rates = SWEEPS[method]
        for task in places:
            wanted = FIRST_RATES.intersection(rates) or set(rates)
            if found := best(task, method, done):
                place = rates.index(found.lr)
                wanted |= {*rates[max(0, place - 1) : place + 2]}
            yield from (RunConfig(task, method, SHORT, lr=rate) for rate in sorted(wanted))


def best(task: str, method: str, done: Finished, tokens: int = SHORT) -> RunConfig | None:
    """The swept configuration of lowest validation perplexity; None when none has run."""
    runs = [c for c in sweep([task], tokens, [method]) if key(c) in done]
    return min(runs, key=lambda c: done[key(c)]["validation"]) if runs else None


def winners(
    tasks: Iterable[str], methods: Iterable[str], tokens: int, seeds: Iterable[int], done: Finished
) -> Iterator[RunConfig]:
    """The swept winners at another budget or with other seeds."""
    names, places = list(methods), list(tasks)
    for seed in seeds:
        for task in places:
            for method in names:
                found = best(task, method, done)
                if found:
                    yield replace(found, tokens=tokens, seed=seed)


def efforts(tasks: Iterable[str]) -> Iterator[tuple[str, RunConfig]]:
    """(effort level, run of its recipe): what the job spec's levels buy."""
    for task in tasks:
        for effort, recipe in RECIPES.items():
            steps = recipe.blockwise_steps
            if recipe.tokens:
                options = {} if steps == BlockEffort().steps else {"blockwise_steps": steps}
                yield effort, RunConfig(task, "kbop", recipe.tokens, lr=FLIP_RATE, options=options)
            else:
                yield effort, RunConfig(task, "quick", options={} if steps == BlockEffort().steps else {"steps": steps})


def ablations(task: str, tokens: int = ABLATION) -> Iterator[tuple[str, str, RunConfig]]:
    """(table, row, run): one knob changed at a time, on one task."""
    base = RunConfig(task, "ablation", tokens, lr=FLIP_RATE)
    yield "rule", "default", base
    yield "rule", "product's optimizer (projections, bfloat16)", replace(base, method="kbop")
    yield "rule", "product's optimizer, int8 evidence", replace(base, method="kbop", options={"evidence": "int8"})
    for rate in (0.0005, 0.001, 0.002, 0.008, 0.016):
        yield "flips' learning rate", f"peak share {rate:g}", replace(base, lr=rate)
    for factor in (0.25, 4.0):
        scale, other = factor * base.scale_lr, factor * base.other_lr
        yield "scale learning rate", f"scale lr {scale:g}", replace(base, scale_lr=scale)
        yield "other learning rate", f"other lr {other:g}", replace(base, other_lr=other)
    for batch in (512, 2048, 4096):
        yield "batch", f"{batch} tokens a step", replace(base, batch_tokens=batch)
    for group in (32, 128, ROW):
        yield "scales", f"group {group if group < ROW else 'row'}", replace(base, group=group)
    for columns in ("shared", "own"):
        for group in (64, ROW):
            size = group if group < ROW else "row"
            found = replace(base, group=group, options={"columns": columns})
            yield "scales", f"group {size}, × {columns} column scales", found
    for start in ("bnn", "plain"):
        yield "init × rule", f"{start}, ours", replace(base, options={"init": start})
        yield "init × rule", f"{start}, scales only", replace(base, method="scales_only", options={"init": start})
    for start, latent in (("plain", "ste"), ("blockwise", "ste_quick")):
        yield "init × rule", f"{start}, latent weights, 0.005", RunConfig(task, latent, tokens, lr=5e-3)
    for name, options in SCRATCH.items():
        yield "from scratch", f"{name}; ours", replace(base, options=options)
        yield "from scratch", f"{name}; scales only", replace(base, method="scales_only", options=options)
    yield "init × rule", "blockwise, scales only", replace(base, method="scales_only", lr=0.0)
    for steps in (100, 1600):
        fitted = RunConfig(task, "quick", options={"steps": steps})
        yield "block-wise reconstruction, nothing end to end", f"{steps:,} steps", fitted
        trained = replace(base, options={"blockwise_steps": steps})
        yield "init × rule", f"blockwise with {steps:,} steps a block, ours", trained
    yield "block-wise reconstruction, nothing end to end", "400 steps, the default", RunConfig(task, "quick")
    for table, knob, values in KNOBS:
        for value in values:
            yield table, f"{knob} {value}", replace(base, options={knob: value})


KNOBS: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("momentum", "momentum", (0.9, 0.98, 0.99, 0.995)),
    ("momentum", "growth", (0.1, 0.4)),
    ("momentum", "first", (5.0, 80.0)),
    ("normalisation", "normalisation", ("evidence", "row", "element", "none")),
    ("normalisation", "power", (0.5, 1.0)),
    ("evidence at flips", "kept_at_flip", (-0.95, -0.6, -0.3, 0.0, 0.3, 1.0)),
    ("curvature penalty", "curvature", (0.1, 0.5)),
    ("significance gate", "significance", (3.0, 4.0)),
    ("schedule", "shape", ("linear", "constant")),
    ("loss", "hidden", (0.1, 1.0)),
    ("loss", "cross_entropy", (0.1, 0.5)),
    ("loss", "temperature", (0.5, 2.0)),
    ("loss", "top_k", (8, 32)),
    ("batch", "late_batch", (2, 4)),
    ("finish", "finish", (0.1, 0.25)),
    ("finish", "average", (0.1, 0.25)),
    ("which layers flip when", "only", ("attention", "mlp", "early", "late")),
    ("which layers flip when", "every", (2, 7)),
)
