"""Owns the training signal: how far the student's next-token distribution is from the teacher's. Holds no model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _KullbackLeibler(torch.autograd.Function):
    """Mean KL(p ‖ q) with q = softmax(z), and its gradient (q − p)/rows in one pass.

    Autograd through log_softmax and kl_div makes the same numbers with twice the passes over (rows, V).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, log_p: Tensor) -> Tensor:
        log_q = torch.log_softmax(logits, dim=-1)
        p = log_p.exp()
        ctx.save_for_backward(log_q, p)
        return (p * (log_p - log_q)).sum() / len(p)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        log_q, p = ctx.saved_tensors
        return log_q.exp().sub_(p).mul_(gradients[0] / len(p)), None


def distillation_loss(student_BTV: Tensor, teacher_BTV: Tensor) -> Tensor:
    """Mean KL(teacher ‖ student) over all positions, nats per token, float32.

    Args:
        student_BTV: logits, any floating dtype.
        teacher_BTV: logits of the same shape, no gradient.
    """
    return kl_to_log_probs(student_BTV, torch.log_softmax(teacher_BTV.float(), dim=-1))


def kl_to_log_probs(student_BTV: Tensor, log_p_BTV: Tensor) -> Tensor:
    """`distillation_loss` from the teacher's log-probabilities instead of its logits.

    Args:
        student_BTV: logits, any floating dtype.
        log_p_BTV: natural logarithms, finite, float32, same shape, no gradient.
    """
    vocabulary = student_BTV.shape[-1]
    logits, log_p = student_BTV.float().reshape(-1, vocabulary), log_p_BTV.reshape(-1, vocabulary)
    loss: Tensor = _KullbackLeibler.apply(logits, log_p)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def teacher_logits(teacher: nn.Module, ids_BT: Tensor) -> Tensor:
    """The teacher's logits (B, T, V) for token ids (B, T)."""
    logits: Tensor = teacher(input_ids=ids_BT, use_cache=False).logits
    return logits
