"""The command: read images, do all runs (or read their files), publish. `--help` lists what can be changed."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.record import publish, shared_data
from benchmarks.super_resolution.images import read_images
from benchmarks.super_resolution.methods import DEFAULT, METHODS
from benchmarks.super_resolution.runs import Plan, Store, run_all
from benchmarks.super_resolution.table import claims, rows
from benchmarks.super_resolution.training import Recipe, RunConfig, bicubic_scores

RUNS = Path(__file__).parent / "runs"
TARGET, MODULE = "make bench-super-resolution", "python -m benchmarks.super_resolution"


def arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(MODULE, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=DEFAULT)
    parser.add_argument("--scales", nargs="+", type=int, default=(2, 4))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2), help="the first one chooses the rates")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of finished runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only-run", action="store_true", help="publish nothing: run a part now, the rest elsewhere")
    for field in fields(Recipe):
        kind = int if isinstance(field.default, int) else float
        parser.add_argument("--" + field.name.replace("_", "-"), type=kind, default=field.default)
    return parser.parse_args(words)


def plan_of(options: argparse.Namespace) -> Plan:
    recipe = Recipe(**{field.name: getattr(options, field.name) for field in fields(Recipe)})
    return Plan(tuple(options.methods), tuple(options.scales), tuple(options.seeds), recipe)


class Bars:
    """A `Watcher`: two bars, runs and the steps of this one."""

    def __init__(self, progress: Progress, runs: int) -> None:
        self.progress = progress
        self.runs, self.steps = progress.add_task("runs", total=runs), progress.add_task("", total=None)

    def begins(self, config: RunConfig) -> None:
        label = f"{METHODS[config.method].label} ×{config.scale}, rate {config.rate:g}, seed {config.seed}"
        self.progress.reset(self.steps, total=config.recipe.steps, description=label)

    def stepped(self, step: int, loss: float) -> None:
        self.progress.update(self.steps, completed=step + 1)

    def ended(self) -> None:
        self.progress.advance(self.runs)


def main(words: list[str]) -> None:
    options = arguments(words)
    folder = shared_data()
    if folder is None or not (folder / "sr").is_dir():
        print("skipped: no shared data (set KBOP_SHARED_DATA)")
        return
    torch.set_num_threads(options.threads)
    plan, console = plan_of(options), Console()
    images = [read_images(folder / "sr", scale) for scale in plan.scales]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        store = Store(options.runs, Bars(progress, plan.runs()))
        chosen = []
        for one in run_all(plan, images, store):
            chosen.append(one)
            psnr = {name: round(value, 2) for name, value in one.results[0].scores[one.method].items()}
            progress.console.print(f"{METHODS[one.method].label} ×{one.scale}: rate {one.rate:g}, first seed {psnr}")
    if not options.only_run:
        command = f"{MODULE} {' '.join(words)}" if words else TARGET
        floor = {of_scale.scale: bicubic_scores(of_scale) for of_scale in images}
        publish("super_resolution", command, rows(chosen, floor), claims(chosen))


if __name__ == "__main__":
    main(sys.argv[1:])
