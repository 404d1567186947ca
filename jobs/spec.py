"""What a user may ask of one job: the wire format, its defaults and its limits.

Refuses to know how a job is run: it holds values and checks them, and imports nothing heavier than pydantic.

The JSON schema of `JobSpec` is the documentation of `POST /v1/jobs`. A field that is not here is an error, and so is
a field that could not take effect.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Effort = Literal["quick", "standard", "max"]
Share = Annotated[float, Field(ge=0.0, le=0.5)]
Weight = Annotated[float, Field(gt=0.0, le=1e6, allow_inf_nan=False)]
LearningRate = Annotated[float, Field(ge=0.0, le=1.0)]
SourceName = Annotated[str, Field(min_length=1, max_length=4096)]


@dataclass(frozen=True)
class Recipe:
    """What an effort level stands for where the spec does not say otherwise.

    Attributes:
        tokens: of end-to-end training.
        blockwise_steps: of each decoder block before it.
    """

    tokens: int
    blockwise_steps: int


#: Chosen from the bench: docs/quality.md, "What the effort levels buy".
RECIPES: dict[str, Recipe] = {
    "quick": Recipe(0, 400),
    "standard": Recipe(800_000, 400),
    "max": Recipe(4_000_000, 1600),
}

#: Fields of `method` that only training reads.
TRAINING_FIELDS = ("batch_tokens", "flip_rate", "momentum", "evidence", "scale_lr", "other_lr")


class Strict(BaseModel):
    """Base of every part of the spec: unknown fields are errors and values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSource(Strict):
    """Text to train or evaluate on."""

    source: SourceName = Field(
        description="`builtin:python-docs`, a path to a .txt, .jsonl (field `text`) or .parquet file, or a hub id "
        "`owner/name[@revision]`.",
        examples=["builtin:python-docs", "/data/stories.jsonl"],
    )
    split: Literal["all", "train", "eval"] = Field(
        default="all",
        description="Which part of the source: `eval` is the held-out tenth (documents by a hash of their text; the "
        "last tenth of a source that is one document), `train` is the rest.",
    )
    weight: Weight | None = Field(
        default=None,
        description="Training sources only: the source gets weight / (sum of weights) of the training windows. Give "
        "one to every source, or to none: without weights all sources are shuffled together, each with the share of "
        "its size.",
    )


class MethodSpec(Strict):
    """How hard to try, and the two learning rates of KBOP."""

    effort: Effort = Field(
        default="standard",
        description="`quick`: BNN Init and block-wise reconstruction, nothing end to end. `standard` and `max`: KBOP "
        "training end to end after them, with 0.8 and 4 million tokens; `max` reconstructs blocks four times as long.",
    )
    tokens: int | None = Field(
        default=None, ge=1, le=10**13, description="Training tokens; replaces the effort level's own number."
    )
    batch_tokens: int = Field(
        default=2048, ge=1, le=2**26, description="Tokens per optimizer step, all ranks together."
    )
    context: int | None = Field(
        default=None,
        ge=2,
        le=1_048_576,
        description="Window length in tokens for training; default: the model's own, at most 2048.",
    )
    flip_rate: Share = Field(
        default=0.004, description="Flips' learning rate: peak share of each layer's signs flipped in a step."
    )
    momentum: float | None = Field(
        default=None,
        ge=0.0,
        le=0.9999,
        description="Decay of the gradient average that decides the flips; default: a memory that grows with the run.",
    )
    evidence: Literal["bfloat16", "int8"] = Field(
        default="bfloat16",
        description="How that average is stored: 2 bytes per weight, or 1.06.",
    )
    scale_lr: LearningRate = Field(
        default=0.01, description="Peak AdamW learning rate of the scales, as a share of their size."
    )
    other_lr: LearningRate = Field(
        default=0.02,
        description="Peak AdamW learning rate of norms, biases, embeddings and head, as a share of their size.",
    )
    calibration_tokens: int = Field(
        default=65_536,
        ge=1,
        le=2**28,
        description="Training tokens that BNN Init and block-wise reconstruction see.",
    )
    blockwise_steps: int | None = Field(
        default=None,
        ge=0,
        le=10**6,
        description="Steps in which each decoder block learns its teacher block's output before training goes end to "
        "end; 0: none; default: the effort level's own number, 400 or, with `max`, 1600.",
    )

    @field_validator("flip_rate", mode="before")
    @classmethod
    def _flip_rate_of_older_specs(cls, value: object) -> object:
        """Specs stored before flip_rate had a number of its own hold null."""
        return cls.model_fields["flip_rate"].default if value is None else value

    def changed(self, fields: Sequence[str]) -> list[str]:
        """Those of `fields` that differ from their defaults."""
        return [f for f in fields if getattr(self, f) != type(self).model_fields[f].default]


class ResourceSpec(Strict):
    """What the job may use."""

    gpus: int = Field(
        default=1, ge=1, le=1024, description="Ranks: one per GPU, or per CPU slot on a server without GPUs."
    )
    max_micro_batch: int = Field(
        default=8, ge=1, le=4096, description="Windows a rank may hold in one micro-step; the rest is accumulated."
    )
    offload: Literal["none", "blocks"] = Field(
        default="none",
        description="`blocks`: the model's decoder blocks stay on disk and are in memory one at a time, so that models "
        "larger than the memory can be binarized; effort `quick` only. Every batch of the evaluation reads the teacher "
        "from disk again.",
    )
    teacher: Literal["resident", "offloaded", "sharded", "cached"] = Field(
        default="resident",
        description="Where the teacher's weights are during training: in the memory of every rank, on disk with one "
        "block at a time in memory, divided over the ranks (ZeRO stage 3), or nowhere, its 64 likeliest tokens at each "
        "position written to disk before. All but `resident` also load the model block by block in the other stages.",
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="Decoder blocks keep only their input for the backward pass and compute the rest again: much less "
        "memory for one more forward pass.",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=1,
        description="DeepSpeed ZeRO stage of the full-precision parameters (scales, norms, embeddings, head): what of "
        "them is divided over the ranks. 1: the optimizer, 2: gradients too, 3: parameters too.",
    )


class JobSpec(Strict):
    """One binarization job."""

    model: SourceName = Field(
        description="`builtin:demo`, a folder in Hugging Face form (safetensors), or a hub id `owner/name[@revision]`.",
        examples=["builtin:demo"],
    )
    data: tuple[DataSource, ...] = Field(min_length=1, max_length=64, description="Training text.")
    eval: tuple[DataSource, ...] = Field(
        default=(),
        max_length=64,
        description="Evaluation text; empty: the held-out tenth of each training source, which training leaves out.",
    )
    name: str | None = Field(default=None, min_length=1, max_length=96, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    init: Literal["pretrained", "random"] = Field(
        default="pretrained",
        description="Start from the signs of the model's own weights, or from random ones (BNN Init in both cases).",
    )
    method: MethodSpec = MethodSpec()
    group_size: int = Field(
        default=128,
        ge=8,
        le=65_536,
        multiple_of=8,
        description="Weights of a row that share a scale; a layer whose width it does not divide has one a row.",
    )
    keep: tuple[str, ...] = Field(
        default=(), max_length=256, description="Modules that stay in full precision, as names or shell patterns."
    )
    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    checkpoint_every: int = Field(
        default=50, ge=1, le=10**6, description="Training steps between resumable checkpoints."
    )
    priority: int = Field(default=0, ge=-100, le=100, description="Larger runs earlier.")
    resources: ResourceSpec = ResourceSpec()

    @model_validator(mode="after")
    def _settings_take_effect(self) -> JobSpec:
        if self.method.effort == "quick" and self.method.tokens is not None:
            raise ValueError("method.tokens has no effect with effort 'quick' (no training): drop it or use 'standard'")
        if self.method.effort == "quick" and (idle := self.method.changed(TRAINING_FIELDS)):
            raise ValueError(f"method.{idle[0]} has no effect with effort 'quick' (no training): drop it")
        if self.init == "random" and (idle := self.method.changed(("calibration_tokens", "blockwise_steps"))):
            raise ValueError(f"method.{idle[0]} has no effect with init 'random': drop it")
        if self.method.effort == "quick" and self.resources.teacher != "resident":
            raise ValueError("resources.teacher has no effect with effort 'quick' (no training): use offload 'blocks'")
        if self.method.effort == "quick" and self.resources.activation_checkpointing:
            raise ValueError("resources.activation_checkpointing has no effect with effort 'quick' (no training)")
        if self.method.effort == "quick" and self.resources.zero_stage != 1:
            raise ValueError("resources.zero_stage has no effect with effort 'quick' (no training): drop it")
        if self.resources.teacher == "sharded" and self.resources.gpus == 1:
            raise ValueError(
                "resources.teacher 'sharded' divides the teacher over ranks: use more gpus, or 'offloaded'"
            )
        if self.resources.offload == "blocks" and self.train_tokens:
            raise ValueError("resources.offload 'blocks' trains block by block: use effort 'quick', or offload 'none'")
        if self.method.effort == "max" and self.method.tokens is not None:
            raise ValueError("method.tokens replaces what effort 'max' stands for: give one of the two")
        if self.method.effort == "quick" and self.init == "random":
            raise ValueError("effort 'quick' keeps the initial signs, which are random here: use 'standard' or 'max'")
        return self

    @model_validator(mode="after")
    def _weights_take_effect(self) -> JobSpec:
        heavy = next((i for i, source in enumerate(self.eval) if source.weight is not None), None)
        if heavy is not None:
            raise ValueError(f"eval[{heavy}].weight has no effect: evaluation text is not drawn from, drop it")
        bare = next((i for i, source in enumerate(self.data) if source.weight is None), None)
        if bare is not None and any(source.weight is not None for source in self.data):
            raise ValueError(f"data[{bare}] has no weight and others have: give a weight to every source or to none")
        if bare is None and len(self.data) == 1:
            raise ValueError("data[0].weight has no effect: there is no other source, drop it")
        return self

    @property
    def train_tokens(self) -> int:
        """End-to-end training tokens this job asks for; 0 means none."""
        return RECIPES[self.method.effort].tokens if self.method.tokens is None else self.method.tokens

    @property
    def blockwise_steps(self) -> int:
        """Steps of block-wise reconstruction of each block; 0 means BNN Init alone, and for random signs."""
        if self.init == "random":
            return 0
        steps = self.method.blockwise_steps
        return RECIPES[self.method.effort].blockwise_steps if steps is None else steps

    def resolved_data(self) -> tuple[tuple[DataSource, ...], tuple[DataSource, ...]]:
        """Training and evaluation sources with the default evaluation split filled in."""
        if self.eval:
            return self.data, self.eval
        train = tuple(DataSource(source=d.source, split="train", weight=d.weight) for d in self.data)
        return train, tuple(DataSource(source=d.source, split="eval") for d in self.data)

    def canonical_json(self) -> str:
        """Sorted, compact JSON of every field: the text whose hash names this spec."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    def digest(self) -> str:
        """sha256 hex of `canonical_json`."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()


def weights_of(sources: Sequence[DataSource]) -> list[float] | None:
    """The sources' weights; None when they have none, and are no mixture."""
    weights = [source.weight for source in sources if source.weight is not None]
    return weights or None
