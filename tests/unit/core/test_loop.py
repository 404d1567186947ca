"""How a step runs out of memory, on an engine that does so where it is told to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kbop_core.errors import OutOfMemory
from kbop_core.loop import Run, StepLayout, TrainConfig, is_out_of_memory, train
from kbop_core.schedules import FlipSchedule
from kbop_core.shard import Gang
from kbop_core.window_source import WindowsInMemory

#: What torch says where the host's memory does not suffice.
HOST = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."
FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"),
    MemoryError(),
    RuntimeError(HOST),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    torch.distributed.DistBackendError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
]


class Engine:
    """Fails once in one part of the step; its backward pass gives the layer a gradient."""

    def __init__(self, part: str, error: Exception | None, give: Callable[[], None]) -> None:
        self.part, self.error, self.give = part, error, give

    def fail(self, part: str) -> None:
        if part == self.part and self.error is not None:
            raise self.error

    def set_learning_rates(self, factor: float) -> None:
        """Nothing learns."""

    def __call__(self, ids_BT: Tensor) -> Tensor:
        self.fail("forward")
        return ids_BT.float()

    def backward(self, loss: Tensor) -> None:
        self.fail("backward")
        self.give()

    def step(self) -> None:
        self.fail("step")


class Half:
    """A teacher from which everything is half a nat away."""

    def loss(self, student_BTV: Tensor, ids_BT: Tensor, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(0.5)


@pytest.fixture
def run_of(learner: Callable) -> Callable[..., Run]:
    """(part that fails, its error, micro_batch) → a run of four windows a step."""

    def make(part: str = "", error: Exception | None = None, micro_batch: int = 4) -> Run:
        layout = StepLayout(3, 4, 1, micro_batch)
        one = learner(4, 8, FlipSchedule(0.1, 5, 1), micro_steps=layout.micro_steps)
        engine: Any = Engine(part, error, lambda: one.layer.gradient_sink(torch.ones(4, 8)))
        windows = WindowsInMemory(torch.zeros(6, 3, dtype=torch.int64), seed=0)
        return Run(TrainConfig(5), layout, Gang(), Half(), engine, one.kbop, windows, torch.device("cpu"))

    return make


@pytest.mark.parametrize("error", FULL, ids=["device", "python", "host", "accelerator", "cublas", "nccl"])
@pytest.mark.parametrize("part", ["forward", "backward", "step"])
def test_running_out_of_memory_is_named_wherever_in_a_step_it_happens(
    part: str, error: Exception, run_of: Callable[..., Run]
) -> None:
    with pytest.raises(OutOfMemory, match=r"a micro-step of 4 windows does not fit into memory: .") as caught:
        next(train(run_of(part, error), range(5)))
    assert caught.value.__cause__ is error and "\n" not in caught.value.message


@pytest.mark.parametrize(("micro_batch", "again"), [(4, True), (2, True), (1, False)])
def test_it_is_worth_trying_again_only_while_a_micro_step_can_be_smaller(
    micro_batch: int, again: bool, run_of: Callable[..., Run]
) -> None:
    with pytest.raises(OutOfMemory) as caught:
        next(train(run_of("forward", MemoryError(), micro_batch), range(5)))
    assert (caught.value.micro_batch, caught.value.retryable) == (micro_batch, again)


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: device-side assert"), ValueError("no memory"), KeyError(1)]
)
def test_other_errors_pass_through_as_they_are(error: Exception, run_of: Callable[..., Run]) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as caught:
        next(train(run_of("backward", error), range(5)))
    assert caught.value is error


def test_an_error_of_who_listens_is_not_taken_for_one_of_the_step(run_of: Callable[..., Run]) -> None:
    steps = train(run_of(), range(5))
    next(steps)
    with pytest.raises(MemoryError):
        steps.throw(MemoryError())


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_a_step_tells_its_number_its_mean_loss_and_every_phase(micro_batch: int, run_of: Callable[..., Run]) -> None:
    told = list(train(run_of(micro_batch=micro_batch), range(2, 5)))
    assert [metrics.step for metrics in told] == [2, 3, 4]
    assert [metrics.loss for metrics in told] == [0.5] * 3
    assert told[0].seconds == dict.fromkeys(("forward", "backward", "communication", "flips", "optimizer"), 0.0)
