"""Owns the two ways to give a layer's gradient to the ranks that own its rows, over gloo, side by side."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from jobs.process import free_port


def two_ways() -> dict[str, float]:
    """Seconds of each way and dtype, one 2048 × 2048 layer, two ranks of one thread."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_reductions, (free_port(), folder), nprocs=2)
        found: dict[str, float] = json.loads((Path(folder) / "found.json").read_text())
    return found


def _reductions(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    whole, found = torch.randn(2048, 2048), {}
    for dtype in (torch.float32, torch.bfloat16):
        part = whole.to(dtype)
        ways: dict[str, Callable[[torch.Tensor], Any]] = {
            "reduce-scatter": _reduce_scatter,
            "all-to-all and sum": _all_to_all,
        }
        for name, way in ways.items():
            way(part)
            began = time.perf_counter()
            for _ in range(10):
                way(part)
            found[f"{name}, {str(dtype).removeprefix('torch.')}"] = (time.perf_counter() - began) / 10
    dist.destroy_process_group()
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))


def _reduce_scatter(part: torch.Tensor) -> None:
    dist.reduce_scatter_tensor(torch.empty_like(part[:1024]), part)


def _all_to_all(part: torch.Tensor) -> torch.Tensor:
    received = torch.empty_like(part)
    dist.all_to_all_single(received, part)
    return received.view(2, 1024, 2048).sum(0, dtype=torch.float32)
