"""The devices of this machine that jobs may run on.

Refuses to import torch: GPUs are asked for through NVML, which needs no CUDA context.
"""

from __future__ import annotations

from collections.abc import Sequence

import pynvml  # type: ignore[import-untyped]

from jobs.errors import NotEnoughDevices
from jobs.spec import JobSpec


def discover_devices(cpu_slots: int, visible: str | None = None) -> list[str]:
    """`["cuda:0", ...]` when NVML works and finds GPUs, else `["cpu:0", ...]` with one entry per slot.

    Args:
        cpu_slots: Ranks that may run at once without GPUs.
        visible: CUDA_VISIBLE_DEVICES of this process, which NVML does not heed; None: not set.
    """
    ids = [str(index) for index in range(_gpu_count())]
    if visible is not None:
        chosen = [entry.strip() for entry in visible.split(",")]
        ids = [entry for entry in chosen if entry in ids or entry.startswith(("GPU-", "MIG-"))] if ids else []
    return [f"cuda:{entry}" for entry in ids] or [f"cpu:{slot}" for slot in range(cpu_slots)]


def _gpu_count() -> int:
    """GPUs that NVML sees; 0 without a driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    try:
        return int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()


def check_feasible(spec: JobSpec, devices: Sequence[str]) -> None:
    """Raise NotEnoughDevices for a job that could never start on these devices."""
    if spec.resources.gpus > len(devices):
        raise NotEnoughDevices(spec.resources.gpus, len(devices))
