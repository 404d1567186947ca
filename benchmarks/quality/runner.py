"""Owns the running of many configurations side by side. Refuses to know which (suites.py).

Runs of small tasks share the processor, one thread each. Runs of large ones follow, one at a time: each has the GPU, or
without one all threads, to itself, and the first trains the teacher that the others find.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

from rich.console import Console

from benchmarks.quality import store
from benchmarks.quality.tasks import SOURCES
from benchmarks.quality.training import RunConfig
from benchmarks.record import commit
from jobs.process import die_with_parent


def run_all(configs: Iterable[RunConfig], workers: int) -> None:
    """Run and store those of the configurations that have no result yet, in this order, large tasks last.

    Args:
        configs: all wanted; equal ones run once.
        workers: processes side by side for small tasks, ≥ 1.
    """
    done = store.finished()
    todo = list({store.key(c): c for c in configs if store.key(c) not in done}.values())
    large = [config for config in todo if SOURCES[config.task].recipe]
    _run_in_pool([config for config in todo if config not in large], workers)
    _run_in_pool(large, 1)


def _run_in_pool(todo: list[RunConfig], workers: int) -> None:
    if not todo:
        return
    console, began, code = Console(), time.monotonic(), commit()
    with ProcessPoolExecutor(workers, get_context("spawn"), die_with_parent, (os.getpid(),)) as pool:
        waiting = {pool.submit(_run_one, config): config for config in todo}
        try:
            for number, future in enumerate(as_completed(waiting), 1):
                config, result = waiting[future], future.result()
                store.save(config, result, code)
                left = (time.monotonic() - began) / number * (len(todo) - number)
                console.print(_line(config, result, f"{number}/{len(todo)}", left))
        except BaseException:  # stopped or broken: what is queued would run to its end and be lost
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _line(config: RunConfig, result: dict[str, Any], place: str, left: float) -> str:
    return (
        f"{place}  {config.task} {config.method} lr {config.lr:g} {config.options or ''} {config.tokens:,} tokens, "
        f"seed {config.seed}: perplexity {result['validation']:.4g} ({result['seconds']:.0f} s; "
        f"{left / 60:.0f} min left)"
    )


def _run_one(config: RunConfig) -> dict[str, Any]:
    import torch

    from benchmarks.quality.methods import METHODS
    from benchmarks.quality.tasks import task
    from benchmarks.quality.training import Diverged, hidden_sizes, run
    from kbop_core.errors import NonFiniteGradient

    if not SOURCES[config.task].recipe:
        torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    where = task(config.task, config.group)
    began = time.perf_counter()
    try:
        student = METHODS[config.method](where, config)
        prepared = time.perf_counter() - began
        sizes = {"hidden_sizes": hidden_sizes(student.model, where.train_NT[:8])}
        return run(where, config, student) | sizes | {"preparation_seconds": round(prepared, 1)}
    except (Diverged, NonFiniteGradient) as error:  # a rate too large for the method is a result of its sweep
        return {"validation": float("inf"), "test": float("inf"), "seconds": 0.0, "diverged": str(error)}
