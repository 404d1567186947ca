"""Owns what the student is compared with in training: a teacher in memory, on disk or over ranks, or stored targets.

| placement | the teacher's weights are | made with |
|---|---|---|
| resident | in this rank's memory | `LiveTeacher` of a model |
| offloaded | on disk, a block at a time in memory | `LiveTeacher` of a lazy model (lazy.py) |
| sharded | divided over the ranks, gathered a layer at a time | `LiveTeacher` of `engine.share_frozen` |
| cached | nowhere: its likeliest tokens are on disk | `CachedTeacher` |

Refuses to choose; losses are distill.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from kbop_core.distill import distillation_loss, teacher_logits, top_k_loss
from kbop_core.target_cache import TargetCache


class Teacher(Protocol):
    """Where the training signal comes from."""

    def loss(self, student_BTV: Tensor, ids_BT: Tensor, numbers: Sequence[int]) -> Tensor:
        """Mean distance of the student's logits from the teacher, nats per token.

        Args:
            student_BTV: logits on `ids_BT`.
            ids_BT: int64 token ids.
            numbers: of the windows that `ids_BT` are.
        """
        ...


class LiveTeacher:
    """A model that answers for every batch: KL over the whole vocabulary.

    Args:
        model: without gradients; same vocabulary and device as the student.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = model

    def loss(self, student_BTV: Tensor, ids_BT: Tensor, numbers: Sequence[int]) -> Tensor:
        """KL(teacher ‖ student), nats per token."""
        return distillation_loss(student_BTV, teacher_logits(self.model, ids_BT))

    @torch.no_grad()
    def log_probs(self, ids_BT: Tensor) -> Tensor:
        """Natural logarithms (B, T, V), float32: what a cache is made from."""
        return teacher_logits(self.model, ids_BT).float().log_softmax(-1)


class CachedTeacher:
    """Stored targets: KL over the teacher's likeliest tokens and the rest as one (`distill.top_k_loss`)."""

    def __init__(self, cache: TargetCache) -> None:
        self._cache = cache

    def loss(self, student_BTV: Tensor, ids_BT: Tensor, numbers: Sequence[int]) -> Tensor:
        """KL of the coarser distribution, nats per token; at most that of LiveTeacher."""
        return top_k_loss(student_BTV, self._cache.read(numbers, student_BTV.device))
