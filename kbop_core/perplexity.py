"""Owns how quality is measured: perplexity, and closeness to the teacher, on the same windows. Trains nothing.

perplexity = exp(Σ nll / Σ tokens) over all positions but the first of non-overlapping windows (text.py cuts them), sums
in float64, natural logarithm; what pads a short window is not counted. KL(teacher ‖ student) and top-1 agreement are
means over the same positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kbop_core.shard import Gang
from kbop_core.text import Windows


@dataclass(frozen=True)
class Quality:
    """What a model scores on one set of windows.

    Attributes:
        perplexity: exp of the mean negative log likelihood; infinite when that overflows.
        nll: mean negative log likelihood, nats per token.
        tokens: predicted tokens.
        kl_to_teacher: mean KL(teacher ‖ model), nats per token; None when no teacher was given.
        top1_agreement: share of positions where both prefer the same token, 0 … 1; None likewise.
    """

    perplexity: float
    nll: float
    tokens: int
    kl_to_teacher: float | None = None
    top1_agreement: float | None = None


@torch.no_grad()
def evaluate(
    model: nn.Module,
    windows: Windows,
    batch: int,
    teacher: nn.Module | None = None,
    gang: Gang | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Quality:
    """Score a model on windows; ranks share them and all get the result.

    Args:
        model: in eval mode; logits (B, T, V).
        windows: all ranks the same.
        batch: windows in one forward pass, ≥ 1.
        teacher: compared with on the same windows when given.
        gang: the ranks.
        progress: told (batches done, batches of this rank).
    """
    gang = gang or Gang()
    device = next(model.parameters()).device
    mine = windows.lengths_N.argsort(stable=True)[gang.rank :: gang.size]  # by length: little padding in a batch
    sums = torch.zeros(4, dtype=torch.float64)  # nll, tokens, kl, agreements
    batches = mine.split(batch) if len(mine) else ()
    for number, rows in enumerate(batches):
        lengths = windows.lengths_N[rows]
        ids = windows.ids_NT[rows, : int(lengths.max())]
        counted = torch.arange(1, ids.shape[1]) < lengths[:, None]
        sums += _sums(model, teacher, ids.to(device), counted.to(device))
        progress(number + 1, len(batches))
    nll, tokens, kl, same = gang.sum(sums.to(device if gang.size > 1 else "cpu")).tolist()
    mean = nll / tokens
    compared = teacher is not None
    return Quality(
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        nll=mean,
        tokens=int(tokens),
        kl_to_teacher=kl / tokens if compared else None,
        top1_agreement=same / tokens if compared else None,
    )


def _sums(model: nn.Module, teacher: nn.Module | None, ids_BT: Tensor, counted_BT: Tensor) -> Tensor:
    """(nll, tokens, KL, agreements) of a batch; `counted` (B, T−1) says which predictions count."""
    logits = model(input_ids=ids_BT, use_cache=False).logits[:, :-1][counted_BT].float()
    log_q = F.log_softmax(logits, dim=-1)
    targets = ids_BT[:, 1:][counted_BT]
    sums = torch.zeros(4, dtype=torch.float64)
    sums[0] = -log_q.gather(-1, targets[:, None]).double().sum()
    sums[1] = targets.numel()
    if teacher is not None:
        other = teacher(input_ids=ids_BT, use_cache=False).logits[:, :-1][counted_BT].float()
        log_p = F.log_softmax(other, dim=-1)
        sums[2] = (log_p.exp() * (log_p - log_q)).double().sum()
        sums[3] = (logits.argmax(-1) == other.argmax(-1)).double().sum()
    return sums
