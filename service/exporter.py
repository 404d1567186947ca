"""What Prometheus scrapes: the store's jobs as metrics, made anew for every scrape. docs/metrics.md lists them.

Refuses to keep anything between scrapes, and to label by anything unbounded: only jobs that an attempt holds have
metrics of their own, so there are never more of them than devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from jobs.overview import Overview
from jobs.records import JobRecord
from jobs.store import Store
from jobs.training_series import PHASES


@dataclass(frozen=True)
class JobGauge:
    """One number of every active job: its metric, what it means, and where the job's progress has it."""

    name: str
    text: str
    read: Callable[[Mapping[str, Any]], object]


def _metric(key: str) -> Callable[[Mapping[str, Any]], object]:
    return lambda progress: (progress.get("metrics") or {}).get(key)


JOB_GAUGES = (
    JobGauge("kbop_job_step", "Steps done of the current stage.", lambda progress: progress.get("step")),
    JobGauge("kbop_job_steps", "Steps of the current stage.", lambda progress: progress.get("steps")),
    JobGauge("kbop_job_eta_seconds", "Estimated seconds left of the stage.", lambda progress: progress.get("eta_s")),
    JobGauge("kbop_job_loss", "Training loss of the last step, nats per token.", _metric("loss")),
    JobGauge("kbop_job_flip_rate", "Share of binary weights flipped in the last step.", _metric("flip_rate")),
    JobGauge(
        "kbop_job_reversal_rate",
        "Share of the last step's flips that give back a sign of the start.",
        _metric("reversal_rate"),
    ),
    JobGauge("kbop_job_tokens_per_second", "Training tokens per second, all ranks.", _metric("tokens_per_s")),
    JobGauge(
        "kbop_job_peak_memory_bytes",
        "Most memory that rank 0 has had in use, of the GPU if it has one.",
        _metric("peak_bytes"),
    ),
    JobGauge("kbop_job_mfu_ratio", "Model FLOPs utilization, on GPUs only.", _metric("mfu")),
)


class StoreCollector(Collector):
    """Reads the store at every scrape.

    Args:
        store: An open store.
        devices: Number of devices jobs can get; None when another process schedules: the metric is then absent.
        version: The installed version of kbop.
    """

    def __init__(self, store: Store, devices: int | None, version: str) -> None:
        self._store = store
        self._devices = devices
        self._version = version

    def describe(self) -> list[Metric]:
        """Nothing: the registry would otherwise read the database to learn the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Every metric; raises StoreUnavailable, so that a scrape fails rather than shows old numbers."""
        found = self._store.overview()
        yield InfoMetricFamily("kbop_build", "The running version.", value={"version": self._version})
        yield from self._server(found)
        yield _job_info(found.active)
        for gauge in JOB_GAUGES:
            yield _job_gauge(gauge, found.active)
        yield _phase_seconds(found.active)

    def _server(self, found: Overview) -> Iterator[Metric]:
        jobs = GaugeMetricFamily("kbop_jobs", "Jobs by status.", labels=["status"])
        for status, count in found.jobs.items():
            jobs.add_metric([status], count)
        yield jobs
        failures = CounterMetricFamily("kbop_job_failures", "Jobs that failed, by error code.", labels=["code"])
        for code, count in found.failures.items():
            failures.add_metric([code], count)
        yield failures
        waited = 0.0 if found.waiting_since is None else max(self._store.now() - found.waiting_since, 0.0)
        yield GaugeMetricFamily("kbop_queue_oldest_wait_seconds", "Wait of the oldest queued job.", value=waited)
        if self._devices is not None:
            yield GaugeMetricFamily("kbop_devices", "Devices jobs can get.", value=self._devices)
        yield GaugeMetricFamily("kbop_devices_in_use", "Devices attempts hold.", value=found.devices_in_use)


def _job_info(active: tuple[JobRecord, ...]) -> Metric:
    info = InfoMetricFamily("kbop_job", "What an active job does.", labels=["job_id", "model", "status", "stage"])
    for job in active:
        stage = (job.progress or {}).get("stage") or ""
        info.add_metric([job.id, str(job.spec.get("model", "")), job.status, str(stage)], {})
    return info


def _job_gauge(gauge: JobGauge, active: tuple[JobRecord, ...]) -> Metric:
    family = GaugeMetricFamily(gauge.name, gauge.text, labels=["job_id"])
    for job in active:
        value = gauge.read(job.progress or {})
        if isinstance(value, int | float):
            family.add_metric([job.id], value)
    return family


def _phase_seconds(active: tuple[JobRecord, ...]) -> Metric:
    text = "Seconds of the last training step, by phase."
    family = GaugeMetricFamily("kbop_job_phase_seconds", text, labels=["job_id", "phase"])
    for job in active:
        metrics = (job.progress or {}).get("metrics") or {}
        for phase in PHASES:
            value = metrics.get(f"{phase}_s")
            if isinstance(value, int | float):
                family.add_metric([job.id, phase], value)
    return family
