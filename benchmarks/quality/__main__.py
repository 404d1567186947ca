"""`make bench-quality`: runs what the chosen suite still lacks, then writes tables, plots and the claims.

    python -m benchmarks.quality                      the short CPU subset: every method, 0.8 M tokens, all small tasks
                                                      here and, on a GPU, the large ones (their teachers are made first)
    python -m benchmarks.quality medium seeds …       longer budgets and more seeds of the winners
    python -m benchmarks.quality ablations            one knob at a time, on the first task
    python -m benchmarks.quality efforts              the job spec's effort levels
    python -m benchmarks.quality tables               nothing is run: docs/quality.md from what there is

Stopped at any time, it goes on where it was. Each run of a small task is one thread in one process; `--workers`
run side by side. Large tasks run on a CPU too, by name: `--tasks wikitext-10m`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from benchmarks.quality import store, suites, tables
from benchmarks.quality.runner import run_all
from benchmarks.quality.tasks import SOURCES, available_tasks
from benchmarks.quality.training import RunConfig

#: Methods of the suites that go beyond the sweep.
HEADLINE = (*suites.PEERS, "kbop")
SUITES = ("short", "medium", "seeds", "ablations", "efforts", "long", "tables")


def main() -> None:
    options = _parse()
    tasks = options.tasks or available_tasks()
    for suite in options.suites:
        if suite == "tables":
            continue
        if suite == "ablations":
            run_all([run for _, _, run in suites.ablations(tasks[0])], options.workers)
            continue
        if suite == "efforts":
            run_all([run for _, run in suites.efforts(tasks)], options.workers)
            continue
        if suite == "short":
            run_all(suites.calibrated(tasks), options.workers)
        _sweep(tasks, options.methods or (suites.SWEEPS if suite == "short" else HEADLINE), options.workers)
        run_all(_winners(suite, tasks, options.methods), options.workers)
    tables.write()


def _sweep(tasks: list[str], methods: Iterable[str], workers: int) -> None:
    """Run rates until the best of each method on each task is known."""
    while True:
        done = store.finished()
        missing = [run for run in suites.bracket(tasks, list(methods), done) if store.key(run) not in done]
        if not missing:
            return
        run_all(missing, workers)


def _winners(suite: str, tasks: list[str], methods: list[str]) -> Iterable[RunConfig]:
    """What a suite runs with the rates that its sweep has found."""
    budgets = {"medium": (suites.MEDIUM, (0,)), "long": (suites.LONG, (0,)), "seeds": (suites.SHORT, suites.SEEDS)}
    if suite not in budgets:
        return []
    tokens, seeds = budgets[suite]
    return suites.winners(tasks, methods or HEADLINE, tokens, seeds, store.finished())


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.quality")
    parser.add_argument("suites", nargs="*", default=["short"], help=f"of {', '.join(SUITES)}")
    parser.add_argument("--tasks", nargs="*", default=[], help="default: all here; the large ones only on a GPU")
    parser.add_argument("--methods", nargs="*", default=[], help="default: all of the suite")
    parser.add_argument("--workers", type=int, default=2, help="processes side by side, small tasks")
    options = parser.parse_args()
    unknown = [s for s in options.suites if s not in SUITES]
    if unknown:
        parser.error(f"no suite {unknown[0]!r}; there are {', '.join(SUITES)}")
    for given, legal in ((options.tasks, SOURCES), (options.methods, suites.SWEEPS)):
        if wrong := [name for name in given if name not in legal]:
            parser.error(f"no {wrong[0]!r}; there are {', '.join(legal)}")
    return options


if __name__ == "__main__":
    main()
