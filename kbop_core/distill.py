"""Owns the training signal: how far the student's next-token distribution is from the teacher's. Holds no model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Logits whose KL is computed at once: 2^24 in float32 are 64 MiB.
CHUNK = 2**24
#: Below this log-probability the rest of a teacher's distribution counts as nothing.
LEAST_REST = -40.0


class _KullbackLeibler(torch.autograd.Function):
    """Mean KL(p ‖ q) with q = softmax(z), and its gradient (q − p)/rows, made together and `CHUNK` numbers at a time.

    What outlives the forward pass is the gradient alone, in the dtype of z. Autograd through log_softmax and kl_div
    makes the same numbers with twice the passes over (rows, V) and several float32 copies of it.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Tensor, are_log_probs: bool) -> Tensor:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), device=logits.device)
        rows = max(1, CHUNK // logits.shape[-1])
        for start in range(0, len(logits), rows):
            part = slice(start, start + rows)
            log_q = torch.log_softmax(logits[part].float(), dim=-1)
            log_p = teacher[part] if are_log_probs else torch.log_softmax(teacher[part].float(), dim=-1)
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum()
            if gradient is not None:
                gradient[part] = log_q.exp_().sub_(p)
        ctx.save_for_backward(gradient)
        return total / len(logits)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (gradients[0] / len(gradient)), None, None


def distillation_loss(student_BTV: Tensor, teacher_BTV: Tensor) -> Tensor:
    """Mean KL(teacher ‖ student) over all positions, nats per token, float32.

    Args:
        student_BTV: logits, any floating dtype.
        teacher_BTV: logits of the same shape, no gradient.
    """
    return _mean_kl(student_BTV, teacher_BTV, False)


def kl_to_log_probs(student_BTV: Tensor, log_p_BTV: Tensor) -> Tensor:
    """`distillation_loss` from the teacher's log-probabilities instead of its logits.

    Args:
        student_BTV: logits, any floating dtype.
        log_p_BTV: natural logarithms, finite, float32, same shape, no gradient.
    """
    return _mean_kl(student_BTV, log_p_BTV, True)


def _mean_kl(student_BTV: Tensor, teacher_BTV: Tensor, are_log_probs: bool) -> Tensor:
    vocabulary = student_BTV.shape[-1]
    logits, teacher = student_BTV.reshape(-1, vocabulary), teacher_BTV.reshape(-1, vocabulary)
    loss: Tensor = _KullbackLeibler.apply(logits, teacher, are_log_probs)  # type: ignore[no-untyped-call]
    return loss


@dataclass(frozen=True)
class TopTargets:
    """A teacher's k likeliest tokens at each position, and the rest as one: what a cache on disk can hold.

    Attributes:
        ids_BTK: int64 token ids.
        log_p_BTK: their natural log-probabilities, float32.
        log_rest_BT: log-probability of all other tokens together, float32; −∞ where there are none.
    """

    ids_BTK: Tensor
    log_p_BTK: Tensor
    log_rest_BT: Tensor


@torch.no_grad()
def top_targets(log_p_BTV: Tensor, k: int) -> TopTargets:
    """The k likeliest tokens of a teacher's log-probabilities, 1 ≤ k ≤ V."""
    best, ids = log_p_BTV.topk(k)
    rest = log_p_BTV.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return TopTargets(ids, best, rest)


class _TopKullbackLeibler(torch.autograd.Function):
    """Mean KL of the distribution over k tokens and "any other", and its gradient, made together in pieces.

    With P = Σ p_k + p_rest and K the k tokens:  ∂/∂z_j = P q_j − p_j [j ∈ K] − p_rest (q_j / q_rest) [j ∉ K].
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, log_p: Tensor, log_rest: Tensor) -> Tensor:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), device=logits.device)
        rows = max(1, CHUNK // logits.shape[-1])
        for start in range(0, len(logits), rows):
            part = slice(start, start + rows)
            log_q = torch.log_softmax(logits[part].float(), dim=-1)
            top_q = log_q.gather(-1, ids[part])
            log_q.scatter_(-1, ids[part], -torch.inf)  # from here on: of the other tokens
            rest_q = log_q.logsumexp(-1, keepdim=True)
            p, rest = log_p[part].exp(), log_rest[part, None].exp()
            some = log_rest[part, None] > LEAST_REST
            total += (p * (log_p[part] - top_q)).sum()
            total += (rest * torch.where(some, log_rest[part, None] - torch.where(some, rest_q, 0.0), 0.0)).sum()
            if gradient is not None:
                mass = p.sum(-1, keepdim=True) + torch.where(some, rest, 0.0)
                others = mass - torch.where(some, rest * (-rest_q).exp(), 0.0)
                gradient[part] = log_q.exp_().mul_(others).scatter_(-1, ids[part], mass * top_q.exp() - p)
        ctx.save_for_backward(gradient)
        return total / len(logits)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (gradients[0] / len(gradient)), None, None, None


def top_k_loss(student_BTV: Tensor, targets: TopTargets) -> Tensor:
    """Mean KL(teacher ‖ student) of the distribution over k tokens and "any other", nats per token.

    It is at most the whole KL (data processing), equal to it for k = V, and unlike a renormalised top-k it is 0 only
    where the student gives the rest its due.
    """
    flat = [t.flatten(0, 1) for t in (student_BTV, targets.ids_BTK, targets.log_p_BTK, targets.log_rest_BT)]
    loss: Tensor = _TopKullbackLeibler.apply(*flat)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def teacher_logits(teacher: Callable[..., Any], ids_BT: Tensor) -> Tensor:
    """The teacher's logits (B, T, V) for token ids (B, T)."""
    logits: Tensor = teacher(input_ids=ids_BT, use_cache=False).logits
    return logits
