"""Owns all runs: which ones there are, their files, and the choice of each method's learning rate.

A rate is chosen per method and scale on the held-out images of T91, with the first seed; the other seeds use it. Test
sets choose nothing. A finished run is one file, FOLDER/METHOD-xSCALE-sSEED-HASH.json, HASH that of its whole
configuration, so that an interrupted benchmark goes on where it was and a changed one starts anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.super_resolution.images import Images
from benchmarks.super_resolution.methods import METHODS
from benchmarks.super_resolution.training import HELD_OUT, Recipe, RunConfig, RunResult, run
from jobs.json_files import read_json, write_json

#: Part of every hash: raise it when images, network or training change what a configuration means.
PROTOCOL = 3


class Watcher(Protocol):
    """Is told what happens."""

    def begins(self, config: RunConfig) -> None: ...

    def stepped(self, step: int, loss: float) -> None: ...

    def ended(self) -> None: ...


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        methods: keys of METHODS.
        scales: of enlargement.
        seeds: the first one chooses the rates.
        recipe: shared by all.
    """

    methods: tuple[str, ...]
    scales: tuple[int, ...]
    seeds: tuple[int, ...]
    recipe: Recipe

    def runs(self) -> int:
        """How many there are."""
        per_scale = sum(len(METHODS[m].rates) + len(self.seeds) - 1 for m in self.methods)
        return per_scale * len(self.scales)


@dataclass(frozen=True)
class Chosen:
    """One method at one scale: its best rate and the results of all seeds with it, in the plan's order."""

    method: str
    scale: int
    rate: float
    results: tuple[RunResult, ...]


def key(config: RunConfig) -> str:
    """Twelve hexadecimal digits that differ when any number of the configuration does."""
    text = json.dumps({"protocol": PROTOCOL, **asdict(config)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def path_of(config: RunConfig, folder: Path) -> Path:
    return folder / f"{config.method}-x{config.scale}-s{config.seed}-{key(config)}.json"


class Store:
    """Runs what has no file yet."""

    def __init__(self, folder: Path, watcher: Watcher) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.watcher = folder, watcher

    def result(self, config: RunConfig, images: Images) -> RunResult:
        """Of the run's file, or of the run."""
        path = path_of(config, self.folder)
        self.watcher.begins(config)
        if (stored := read_json(path)) is not None:
            found = RunResult(**stored["result"])
        else:
            found = run(config, images, self.watcher.stepped)
            write_json(path, {"config": asdict(config), "result": asdict(found)})
        self.watcher.ended()
        return found


def choose(method: str, plan: Plan, images: Images, store: Store) -> Chosen:
    """Sweep the rates with the first seed, then run the other seeds with the best (the first of equals)."""
    first, *others = plan.seeds

    def one(rate: float, seed: int) -> RunResult:
        return store.result(RunConfig(method, images.scale, rate, seed, plan.recipe), images)

    swept = {rate: one(rate, first) for rate in METHODS[method].rates}
    best = max(swept, key=lambda rate: swept[rate].scores[method][HELD_OUT])
    return Chosen(method, images.scale, best, (swept[best], *(one(best, seed) for seed in others)))


def run_all(plan: Plan, images: Sequence[Images], store: Store) -> Iterator[Chosen]:
    """Every method at every scale; `images` has one entry per scale."""
    for of_scale in images:
        for method in plan.methods:
            yield choose(method, plan, of_scale, store)
