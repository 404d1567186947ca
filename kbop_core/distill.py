"""Owns the training signal: how far the student's next-token distribution is from the teacher's. Holds no model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def distillation_loss(student_BTV: Tensor, teacher_BTV: Tensor) -> Tensor:
    """Mean KL(teacher ‖ student) over all positions, nats per token, float32.

    Args:
        student_BTV: logits, any floating dtype.
        teacher_BTV: logits of the same shape, no gradient.
    """
    vocabulary = student_BTV.shape[-1]
    log_q = F.log_softmax(student_BTV.float(), dim=-1).view(-1, vocabulary)
    log_p = F.log_softmax(teacher_BTV.float(), dim=-1).view(-1, vocabulary)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


@torch.no_grad()
def teacher_logits(teacher: nn.Module, ids_BT: Tensor) -> Tensor:
    """The teacher's logits (B, T, V) for token ids (B, T)."""
    logits: Tensor = teacher(input_ids=ids_BT, use_cache=False).logits
    return logits
