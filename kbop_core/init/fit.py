"""Owns the fit of one layer: signs and scales that keep its output on given inputs. Knows no model and no data.

The student's layer reads x, the output of the already binary layers before it; the teacher's read t. Minimise over
S ∈ {±1}^{O×I} and α ∈ R^{O×G}, Ŵ = α ⊙ S, the expected squared distance to a target between W x and W t:

    L = E‖(1−τ) W x + τ W t − Ŵ x‖² = tr(Ŵ H Ŵᵀ) − 2 tr(Ŵ Rᵀ) + const
    H = E[x xᵀ] (damped),   R = W ((1−τ) H + τ C)ᵀ,   C = E[x tᵀ]

τ = 0 keeps what the layer does to its inputs (GPTQ's objective), τ = 1 repairs the errors of all layers before it and
overfits them; one half is far better than both: stories260K 103, 77 and 61 perplexity (`make bench-init`).

By turns: (i) scales by least squares, per row a G×G system  (Sᵀ H S)_gg' α_g' = (Sᵀ R)_g;  (ii) signs by exact
coordinate descent, column after column, all rows at once: a flip changes ŵ_ij by δ = −2 ŵ_ij and the loss by
−2 δ P_ij + δ² H_jj with P = R − Ŵ H; flip where that is negative, then P_i ← P_i − δ H_j. Columns are swept in
blocks, with one matrix product per block for the rest of P (the lazy update of GPTQ). A sweep costs O·I² multiply-adds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Columns swept between two matrix products.
BLOCK = 64


@dataclass(frozen=True)
class FitEffort:
    """How long to alternate.

    Attributes:
        rounds: scale refits, each followed by sweeps.
        sweeps: most sign sweeps in a round; a sweep without a flip ends the round.
        damping: share of mean(diag H) added to the diagonals of H and C.
        teacher_share: τ, 0 … 1: how much of the target is the teacher's own output.
    """

    rounds: int = 3
    sweeps: int = 8
    damping: float = 0.01
    teacher_share: float = 0.5


@torch.no_grad()
def fit_layer(
    weight_OI: Tensor, moment_II: Tensor, groups: int, effort: FitEffort, cross_II: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Signs and scales for one layer (or any rows of it: rows do not interact).

    Args:
        weight_OI: float32 (O, I); O may be 0.
        moment_II: H, float32 (I, I), symmetric; not changed. All zeros (inputs never seen) means white inputs.
        groups: G, divides I.
        effort: when to stop.
        cross_II: C, float32 (I, I), student's inputs along rows; None when teacher and student read the same: H.

    Returns:
        New tensors: signs (O, I) of ±1 and scales (O, G) ≥ 0.
    """
    if weight_OI.shape[0] == 0:
        return weight_OI.clone(), weight_OI.new_zeros(0, groups)
    target_IO = weight_OI.t().contiguous()  # columns of the layer are rows here: the sweep reads them one by one
    moment, cross = _damped(moment_II, moment_II if cross_II is None else cross_II, effort.damping)
    wanted_IO = torch.lerp(moment, cross, effort.teacher_share) @ target_IO  # Rᵀ
    signs_IO = torch.where(target_IO >= 0, 1.0, -1.0)
    scales_GO = target_IO.view(groups, -1, target_IO.shape[1]).abs().mean(1)
    for _ in range(effort.rounds):
        scales_GO = _refit(wanted_IO, signs_IO, scales_GO, moment)
        for _ in range(effort.sweeps):
            pull_IO = wanted_IO - moment @ _effective(signs_IO, scales_GO)
            if not _sweep(pull_IO, signs_IO, scales_GO, moment):
                break
    scales_GO = _refit(wanted_IO, signs_IO, scales_GO, moment)
    return signs_IO.t().contiguous(), scales_GO.t().contiguous()


def output_error(weight_OI: Tensor, approximation_OI: Tensor, moment_II: Tensor) -> float:
    """tr(E H Eᵀ)/tr(W H Wᵀ) with E = W − Ŵ: relative squared error of the layer's output, unit 1."""
    error = weight_OI - approximation_OI
    return float(((error @ moment_II) * error).sum() / ((weight_OI @ moment_II) * weight_OI).sum())


def _damped(moment_II: Tensor, cross_II: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    eye = torch.eye(moment_II.shape[0], device=moment_II.device)
    level = moment_II.diagonal().mean()
    if level == 0:
        return eye, eye
    return moment_II + damping * level * eye, cross_II + damping * level * eye


def _effective(signs_IO: Tensor, scales_GO: Tensor) -> Tensor:
    grouped = signs_IO.view(scales_GO.shape[0], -1, signs_IO.shape[1]) * scales_GO[:, None]
    return grouped.view_as(signs_IO)


def _refit(wanted_IO: Tensor, signs_IO: Tensor, scales_GO: Tensor, moment_II: Tensor) -> Tensor:
    """Least-squares scales; a negative one is folded into its signs (in place), a singular row keeps its old scales."""
    groups, rows = scales_GO.shape
    grouped = signs_IO.view(groups, -1, rows)
    width = grouped.shape[1]
    system = torch.empty(rows, groups, groups, device=signs_IO.device)
    for g in range(groups):
        shared = moment_II[:, g * width : (g + 1) * width] @ grouped[g]  # H[:, g] S_g: (I, O)
        system[:, :, g] = (shared.view_as(grouped) * grouped).sum(1).t()
    wanted = (wanted_IO.view_as(grouped) * grouped).sum(1).t()
    solved, failed = torch.linalg.solve_ex(system, wanted.unsqueeze(-1))
    fresh = solved.squeeze(-1).t()
    usable = (failed == 0) & fresh.isfinite().all(0)
    fresh = torch.where(usable, fresh, scales_GO)
    grouped *= torch.where(fresh < 0, -1.0, 1.0)[:, None]
    return fresh.abs()


def _sweep(pull_IO: Tensor, signs_IO: Tensor, scales_GO: Tensor, moment_II: Tensor) -> int:
    """One pass of coordinate descent over all columns, in place.

    Args:
        pull_IO: Pᵀ = Rᵀ − H Ŵᵀ; overwritten.
        signs_IO: overwritten.

    Returns:
        Number of flips.
    """
    columns, width, flips = signs_IO.shape[0], signs_IO.shape[0] // scales_GO.shape[0], 0
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        local_P, local_H = pull_IO[start:stop].clone(), moment_II[start:stop, start:stop]
        deltas = torch.zeros_like(local_P)
        for j in range(stop - start):
            delta = signs_IO[start + j] * scales_GO[(start + j) // width] * -2.0
            flip = delta * (delta * local_H[j, j] - 2.0 * local_P[j]) < 0
            deltas[j] = delta * flip
            local_P.addr_(local_H[j], deltas[j], alpha=-1.0)
        changed = deltas != 0
        flips += int(changed.sum())
        signs_IO[start:stop] *= torch.where(changed, -1.0, 1.0)
        pull_IO.addmm_(moment_II[:, start:stop], deltas, alpha=-1.0)
    return flips
