"""Owns reading what training wrote about each step: lines of `metrics.jsonl`, thinned, while it still grows.

Refuses to load torch, to write, and to hold the file in memory: a line may name every layer and a run may have
100,000 of them, so the file is walked once and only the chosen lines are parsed.

    ask(every, limit) → steps divisible by `every`; `every` doubles until at most `limit` are left; plus the newest

Steps in the file grow: an attempt that resumes first drops the lines behind its checkpoint. A line without its
newline is still being written and is left out, as is one that is not a step.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

#: The first key of every line; found without parsing the layers behind it.
_STEP = re.compile(rb'\s*\{\s*"step"\s*:\s*([0-9]{1,15})\s*[,}]')


def _finite(value: object) -> object:
    """NaN and infinities are not JSON: a loss that diverged is shown as missing."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]


class StepSeconds(BaseModel):
    """Where the time of one step went on rank 0, seconds."""

    forward: Number = Field(default=None, description="Student and teacher forward passes.")
    backward: Number = Field(
        default=None, description="Backward passes and the evidence they add to, without the wait for others."
    )
    communication: Number = Field(
        default=None, description="Waiting for other ranks: gradients, moments, thresholds, bits, losses."
    )
    flips: Number = Field(default=None, description="KBOP's own step: moments, choice of flips, flipping.")
    optimizer: Number = Field(
        default=None, description="DeepSpeed's step of scales and full-precision parameters, its waits included."
    )


#: The parts of a step, in the order in which they are shown; `<phase>_s` in a job's progress metrics.
PHASES = tuple(StepSeconds.model_fields)


class TrainingStep(BaseModel):
    """One training step; what an older version did not record is absent."""

    step: int = Field(description="Number of the step, from 0.")
    loss: Number = Field(default=None, description="Mean KL to the teacher, nats per token; absent if not finite.")
    flip_rate: Number = Field(default=None, description="Share of all binary weights flipped in the step, 0 to 1.")
    reversal_rate: Number = Field(
        default=None, description="Share of the step's flips that give back a sign of the start, 0 to 1; estimated."
    )
    tokens_per_s: Number = Field(
        default=None, description="Training tokens per second, all ranks together, in the attempt so far."
    )
    seconds: StepSeconds | None = Field(default=None, description="Where the time of the step went.")
    peak_bytes: int | None = Field(
        default=None, description="Most memory that rank 0 has had in use, bytes: of the GPU if it has one."
    )
    mfu: Number = Field(
        default=None, description="Model FLOPs utilization in the attempt so far, 0 to 1; only on GPUs."
    )
    flips: dict[str, int] | None = Field(default=None, description="Flips by layer; with `layers=true`.")
    reversals: dict[str, int] | None = Field(default=None, description="Reversals by layer; with `layers=true`.")


@dataclass(frozen=True)
class SeriesQuery:
    """Which steps to read.

    Attributes:
        since: First step, inclusive.
        until: Last step, inclusive; None: the newest there is.
        every: Least distance of two steps, at least 1.
        limit: Most steps beside the newest, at least 1.
        layers: Whether to keep flips and reversals per layer.
    """

    since: int = 0
    until: int | None = None
    every: int = 1
    limit: int = 500
    layers: bool = False


@dataclass(frozen=True)
class TrainingSeries:
    """Chosen steps in rising order, and the distance `every` that was needed to keep within the limit."""

    steps: tuple[TrainingStep, ...]
    every: int


@dataclass(frozen=True)
class _Place:
    """Where the line of a step is: offset and length in bytes."""

    step: int
    offset: int
    length: int


def read_series(path: Path, query: SeriesQuery) -> TrainingSeries:
    """The steps of a `metrics.jsonl` that the query chooses; none when there is no file."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return TrainingSeries((), query.every)
    with file:
        places, every = _thin(_places(file, query), query.every, query.limit)
        found = [_parse(file, place, query.layers) for place in places]
    return TrainingSeries(tuple(step for step in found if step is not None), every)


def _thin(places: Iterator[_Place], every: int, limit: int) -> tuple[list[_Place], int]:
    """The places to show; doubling keeps a subset, so one pass with `limit` places in memory does."""
    kept: list[_Place] = []
    newest: _Place | None = None
    for newest in places:
        if newest.step % every == 0:
            kept.append(newest)
        while len(kept) > limit:
            every *= 2
            kept = [place for place in kept if place.step % every == 0]
    if newest is not None and kept[-1:] != [newest]:
        kept.append(newest)
    return kept, every


def _places(file: BinaryIO, query: SeriesQuery) -> Iterator[_Place]:
    """Places of the complete lines with a step in the query's range, each step once, rising."""
    last = query.since - 1
    offset = _offset_of(file, query.since)
    file.seek(offset)
    for line in file:
        found = _STEP.match(line)
        if found and line.endswith(b"\n") and int(found[1]) > last:
            last = int(found[1])
            if query.until is not None and last > query.until:
                return
            yield _Place(last, offset, len(line))
        offset += len(line)


def _offset_of(file: BinaryIO, step: int) -> int:
    """Where the first line of `step` or a later one begins: bisection over bytes, since steps rise.

    A reader that follows a run asks for its last few lines again and again; it should not cost the whole file.
    """
    if step <= 0:
        return 0
    low, high = 0, file.seek(0, os.SEEK_END)
    while low < high:
        middle = (low + high) // 2
        begin, found = _next_step(file, middle)
        if found is None or found >= step:
            high = middle
        else:
            low = begin + 1
    return _next_step(file, low)[0]


def _next_step(file: BinaryIO, offset: int) -> tuple[int, int | None]:
    """Offset and step of the first line with a step that begins at `offset` or behind it."""
    file.seek(max(offset - 1, 0))
    if offset:
        file.readline()  # ends at `offset` when a line begins there
    while True:
        begin = file.tell()
        line = file.readline()
        found = _STEP.match(line)
        if found:
            return begin, int(found[1])
        if not line:
            return begin, None


def _parse(file: BinaryIO, place: _Place, layers: bool) -> TrainingStep | None:
    """The step at a place; None when the line is damaged, or a resuming attempt has just rewritten the file."""
    file.seek(place.offset)
    try:
        step = TrainingStep.model_validate_json(file.read(place.length))
    except ValidationError:
        return None
    if step.step != place.step:
        return None
    return step if layers else step.model_copy(update={"flips": None, "reversals": None})
