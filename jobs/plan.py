"""Owns the plan of a job before it runs: memory beside a device's, traffic, disk and time, and what to change.

Refuses to invent a speed: time comes from a throughput that somebody stated or measured, or from stated FLOP/s, and
the plan says which. Sizes are model_shape.py's, bytes of a rank memory_plan.py's; imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import ceil
from typing import Any

from jobs.errors import BadPlan
from jobs.memory_plan import MemoryPlan, Phase
from jobs.model_shape import ModelShape
from jobs.plan_request import PlanRequest
from jobs.tensor_sizes import CHECKPOINTS, COUNTS, HISTOGRAMS, PROBES, WIRE, cached_token_bytes

#: Share of a device's memory that a plan may fill: the rest covers what is not counted (driver, libraries,
#: fragmentation) and the plan's own error (docs/plan.md).
USABLE = 0.9
#: Bytes a weight costs with latent weights and AdamW in bfloat16: 2 on every rank, and of the owned ones a float32
#: master, two moments and a gradient under ZeRO-2. In float32 the weight itself takes 4.
LATENT_OWNED_BYTES = 16


@dataclass(frozen=True)
class Speed:
    """How fast training goes, and who says so.

    Attributes:
        tokens_per_s: of all ranks together.
        source: "stated", "measured in job …" or "derived from …".
    """

    tokens_per_s: float
    source: str

    def __post_init__(self) -> None:
        if not self.tokens_per_s > 0:
            raise BadPlan(f"throughput is {self.tokens_per_s} tokens/s", "give a number above 0")


def speed_from_report(report: Mapping[str, Any]) -> Speed:
    """The speed of a finished job: its training tokens over its training time.

    Raises:
        BadPlan: the report has no training in it.
    """
    tokens = (report.get("training") or {}).get("tokens")
    seconds = ((report.get("time") or {}).get("stages") or {}).get("train")
    if not tokens or not seconds:
        raise BadPlan("the report has no training time and tokens", "use the report of a job that trained")
    return Speed(tokens / seconds, f"measured in job {report.get('job_id')}")


@dataclass(frozen=True)
class Plan:
    """What a job would take.

    Attributes:
        shape: the model.
        request: how it is trained.
        device_memory: bytes of one device; None when nobody said.
        tokens: of training.
        speed: None when nobody said.
    """

    shape: ModelShape
    request: PlanRequest
    device_memory: int | None = None
    tokens: int = 0
    speed: Speed | None = None

    def __post_init__(self) -> None:
        if self.device_memory is not None and self.device_memory < 1:
            raise BadPlan(f"device memory is {self.device_memory} bytes", "give a size such as 80GB")
        if self.tokens < 0:
            raise BadPlan(f"tokens is {self.tokens}", "give 0 or more")

    @cached_property
    def memory(self) -> MemoryPlan:
        """Bytes on a rank."""
        return MemoryPlan(self.shape, self.request)

    @property
    def peak(self) -> Phase:
        """The moment with the most bytes."""
        return self.memory.peak

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within `USABLE` of the device; None when nobody said how large that is."""
        return None if self.device_memory is None else self.peak.bytes <= USABLE * self.device_memory

    @property
    def host_bytes(self) -> int:
        """Host memory of one rank: the copy of its state while a checkpoint is written; with a GPU, a model loaded.

        On a CPU this comes on top of the rank's peak. Token ids stay on disk.
        """
        if self.request.device == "cpu":
            return self.memory.snapshot
        shape, w = self.shape, self.request.element
        by_blocks = self.memory.block + w * (shape.embedding + shape.head)
        loading = w * shape.parameters if self.request.teacher == "resident" else by_blocks
        return max(loading, self.memory.snapshot)

    @property
    def disk_bytes(self) -> dict[str, int]:
        """What training writes, by name: checkpoints (two kept, one being written), a cached teacher's targets."""
        alone = MemoryPlan(self.shape, replace(self.request, ranks=1, teacher="resident"))
        columns = 4 * sum(la.in_features for la in alone.binary)  # each rank writes them
        found = {"checkpoints": CHECKPOINTS * (alone.snapshot + (self.request.ranks - 1) * columns)}
        if self.request.teacher == "cached":
            found["teacher's targets"] = self.tokens * cached_token_bytes(self.shape.vocabulary)
        return found

    @property
    def latent_bytes(self) -> int:
        """What the binary weights would cost on a rank as latent weights with AdamW under ZeRO-2."""
        weights, ranks = self.memory.binary_weights, self.request.ranks
        return self.request.element * weights + ceil(LATENT_OWNED_BYTES * weights / ranks)

    @property
    def kbop_bytes(self) -> int:
        """What they cost here: bits, evidence, moments, and AdamW of their scales."""
        memory = self.memory
        of_scales = (memory.parameters + memory.optimizer) * memory.scales / memory.real
        return memory.bits + memory.first_signs + memory.evidence + memory.moments + ceil(of_scales)

    @property
    def traffic(self) -> dict[str, int]:
        """Bytes a rank sends in one step, by collective (ring algorithms: a reduce-scatter sends (N−1)/N of its input).

        Gradients of signs go to their owners in `WIRE` bytes each, an all-to-all once per micro-step; projections of
        columns likewise, once a step, and their squares come back.
        """
        n, memory, request = self.request.ranks, self.memory, self.request
        if n == 1:
            return {}
        w, micro, part = request.element, request.micro_steps, (n - 1) / n
        padded = sum(memory.rows(la) * n * la.in_features for la in memory.binary)
        real = memory.real
        reductions = micro if request.zero_stage >= 2 else 1
        gathers = {0: 0, 1: 1, 2: 1, 3: 2 * micro}[request.zero_stage]
        full = w * real * part * (2 if request.zero_stage == 0 else reductions)
        found = {
            "sign gradients": WIRE * padded * part * micro,
            "bits": memory.bits * part,
            "moments": part * (4 * PROBES + 4) * sum(la.in_features for la in memory.binary),
            "thresholds": 2 * part * 4 * HISTOGRAMS * COUNTS * len(memory.binary),
            "real gradients": full,
            "real parameters": gathers * w * real * part,
            "teacher": w * self.shape.parameters * part * micro if request.teacher == "sharded" else 0,
        }
        return {name: ceil(size) for name, size in found.items() if size}

    @property
    def flops_per_token(self) -> int:
        """Multiply-adds counted twice: student forward and backward (3 passes), teacher (1), blocks again (1)."""
        request, shape = self.request, self.shape
        blocks = 2 * sum(la.weights for la in shape.linears)
        blocks += 2 * request.context * shape.heads * shape.head_dim * shape.blocks  # causal: half of the products
        head = 2 * shape.vocabulary * shape.hidden
        passes = 3 + (request.teacher != "cached")
        return passes * (blocks + head) + request.activation_checkpointing * blocks

    @property
    def seconds(self) -> float | None:
        """Training time; None without a speed."""
        return None if self.speed is None else self.tokens / self.speed.tokens_per_s

    def suggestions(self) -> list[tuple[str, int]]:
        """What would lower the peak, with the peak it leads to in bytes, best first; single changes only."""
        found = [(words, Plan(self.shape, other).peak.bytes) for words, other in _changes(self.request)]
        return sorted(((w, b) for w, b in found if b < self.peak.bytes), key=lambda change: change[1])

    def to_json(self) -> dict[str, Any]:
        """Plain data: everything above."""
        memory = self.memory
        return {
            "model": self.shape.name,
            "parameters": self.shape.parameters,
            "binary_weights": memory.binary_weights,
            "sizes": "from the weight files" if self.shape.exact else "from the config",
            "request": asdict(self.request),
            "memory": {
                "peak": memory.peak.name,
                "peak_bytes": memory.peak.bytes,
                "training_peak_bytes": memory.training_peak.bytes,
                "phases": [{"phase": p.name, "bytes": p.bytes, "parts": p.parts} for p in memory.phases],
                "device_bytes": self.device_memory,
                "fits": self.fits,
                "host_bytes": self.host_bytes,
                "disk_bytes": self.disk_bytes,
                "binary_weights_bytes": self.kbop_bytes,
                "latent_adamw_zero2_bytes": self.latent_bytes,
            },
            "traffic_bytes_per_step": self.traffic,
            "tokens": self.tokens,
            "flops_per_token": self.flops_per_token,
            "time": None
            if self.speed is None
            else {"seconds": self.seconds, "tokens_per_s": self.speed.tokens_per_s, "source": self.speed.source},
            "suggestions": [{"change": words, "peak_bytes": size} for words, size in self.suggestions()],
        }


def derived_speed(plan: Plan, flops_per_s: float, utilization: float) -> Speed:
    """The speed that stated FLOP/s of one device give at a stated share of use.

    Raises:
        BadPlan: FLOP/s that are not above 0, or a share outside 0 … 1.
    """
    if not flops_per_s > 0 or not 0 < utilization <= 1:
        raise BadPlan(
            f"{flops_per_s} FLOP/s at utilization {utilization}", "FLOP/s above 0, utilization above 0 and up to 1"
        )
    total = flops_per_s * utilization * plan.request.ranks / plan.flops_per_token
    return Speed(total, f"derived from {flops_per_s:.3g} FLOP/s a device at {utilization:.0%} utilization")


def _changes(request: PlanRequest) -> Iterator[tuple[str, PlanRequest]]:
    """Single changes to a request, in words and done."""
    if request.micro_batch > 1:
        half = request.micro_batch // 2
        steps = ceil(request.micro_steps * request.micro_batch / half)
        smaller = replace(request, micro_batch=half, micro_steps=steps)
        yield f"micro-batch {half} instead of {request.micro_batch}", smaller
    if not request.activation_checkpointing:
        yield "activation checkpointing", replace(request, activation_checkpointing=True)
    if request.evidence == "bfloat16":
        yield "evidence int8", replace(request, evidence="int8")
    if request.teacher != "offloaded":
        yield "teacher offloaded", replace(request, teacher="offloaded")
    if request.teacher != "cached":
        yield "teacher cached on disk", replace(request, teacher="cached")
    if request.ranks > 1 and request.teacher == "resident":
        yield "teacher sharded over the ranks", replace(request, teacher="sharded")
    if request.ranks > 1 and request.zero_stage < 3:
        yield f"ZeRO stage {request.zero_stage + 1}", replace(request, zero_stage=request.zero_stage + 1)
    yield f"{2 * request.ranks} ranks", replace(request, ranks=2 * request.ranks)
