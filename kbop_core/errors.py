"""Owns the exception tree of the core; refuses to know how an error is shown or what a job does about it.

    KbopError
    ├── ModelError
    │   ├── NothingToBinarize      no linear layer found in the decoder blocks
    │   ├── BadWeights             NaN or infinity in the pretrained weights
    │   └── UnsupportedModel       a structure the conversion does not handle
    ├── DataError
    │   ├── EmptyText              no text, or only white space
    │   ├── NotUtf8                bytes that are not UTF-8
    │   ├── TextTooShort           fewer tokens than one window
    │   ├── DataOverlap            evaluation text is also training text
    │   └── DamagedTokens          a token file that is not what was written
    ├── TrainingError
    │   ├── NonFiniteLoss          stopped before any weight changed
    │   ├── NonFiniteGradient      stopped before any weight changed
    │   ├── GradientContract       a layer's gradient arrived not exactly once per micro-step
    │   └── OutOfMemory            a micro-step does not fit; a smaller one may
    └── CheckpointError
        ├── BadCheckpoint          damaged, incomplete or of an unknown version
        └── DiskFull               no space; nothing half-written is visible

Every error carries a stable `code`, a `hint` (what to do) and whether trying again can help.
"""

from __future__ import annotations

from typing import ClassVar


class KbopError(Exception):
    """Base of every error this package raises on purpose."""

    code: ClassVar[str] = "kbop_error"
    origin: ClassVar[str] = "user"
    retryable: bool = False

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ModelError(KbopError):
    """The model cannot be binarized as it is."""

    code = "model_error"


class NothingToBinarize(ModelError):
    """No linear layer to binarize."""

    code = "nothing_to_binarize"


class BadWeights(ModelError):
    """Pretrained weights that are not numbers."""

    code = "bad_weights"


class UnsupportedModel(ModelError):
    """A structure that conversion does not handle."""

    code = "unsupported_model"


class DataError(KbopError):
    """The text cannot be used."""

    code = "data_error"


class EmptyText(DataError):
    """No text."""

    code = "empty_text"


class NotUtf8(DataError):
    """Bytes that are not UTF-8."""

    code = "not_utf8"


class TextTooShort(DataError):
    """Fewer tokens than one window."""

    code = "text_too_short"


class DataOverlap(DataError):
    """Evaluation text that is also training text."""

    code = "data_overlap"


class DamagedTokens(DataError):
    """A token file is missing or not what was written."""

    code = "damaged_tokens"
    origin = "system"
    retryable = True


class TrainingError(KbopError):
    """Training cannot go on."""

    code = "training_error"


class NonFiniteLoss(TrainingError):
    """NaN or infinity in the loss."""

    code = "non_finite_loss"


class NonFiniteGradient(TrainingError):
    """NaN or infinity in a gradient."""

    code = "non_finite_gradient"


class GradientContract(TrainingError):
    """A binary layer's gradient arrived not exactly once per micro-step."""

    code = "gradient_contract"
    origin = "system"


class OutOfMemory(TrainingError):
    """A micro-step does not fit into the device's memory.

    Args:
        micro_batch: windows in it; with more than one, trying again with fewer can help.
    """

    code = "out_of_memory"
    origin = "system"

    def __init__(self, micro_batch: int, detail: str) -> None:
        smaller = "the next attempt takes half as many windows at a time"
        other = "set resources.activation_checkpointing or resources.teacher, shorten method.context, or take more gpus"
        hint = smaller if micro_batch > 1 else other
        super().__init__(f"a micro-step of {micro_batch} windows does not fit into memory: {detail}", hint)
        self.micro_batch = micro_batch
        self.retryable = micro_batch > 1


class CheckpointError(KbopError):
    """A checkpoint cannot be written or read."""

    code = "checkpoint_error"
    origin = "system"


class BadCheckpoint(CheckpointError):
    """Damaged, incomplete or of an unknown version."""

    code = "bad_checkpoint"


class DiskFull(CheckpointError):
    """No space left on the device."""

    code = "disk_full"
    retryable = True
