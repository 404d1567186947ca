"""Owns alternating refined binarization in the manner of ARB-LLM (arXiv 2410.03129), held to our bits.

Refuses what costs more than a sign a weight and a scale a group: no row shift, no second-order binarization of salient
columns, no masks, no group bitmaps. What is left of the paper, in our own code:

    refine:   α_g ← mean(s ⊙ w),   s ← sign(w)                                     distance of the weights
    ARB-X:    α_g ← s_gᵀ (H (w − Σ_{g'≠g} α_g' s_g'))_g / (s_gᵀ H_gg s_g)          distance of the outputs, s fixed

Read its results with this in mind: the paper's refinement lives on the row shift, which moves the level that signs are
taken at. Without it sign(w) and mean |w| are a fixed point from the first round, so that the first line does nothing,
and the second, with s fixed as in the paper, can only move scales. The published 1-bit numbers of ARB-LLM spend
2.5 bits and more. As the paper's pipeline (BiLLM's) also lets later columns make up for each block's error,
`compensate` adds that: signs then are those of the compensated weights. Neither is always ahead: measure both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kbop_core.baselines.gptq import inverse_factor

#: sᵀ H s, as a share of H's trace, from which down it is rounding: a quotient by it would be noise.
NEGLIGIBLE = 1e-6


@torch.no_grad()
def arb_layer(
    weight_OI: Tensor,
    moment_II: Tensor,
    groups: int,
    rounds: int = 15,
    compensate: bool = False,
    damping: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """Signs and scales for one layer (or any rows of it: rows do not interact).

    A scale that the outputs want negative becomes 0. Each update is the exact minimum over one scale ≥ 0, so that
    without `compensate` tr((W−Ŵ) H (W−Ŵ)ᵀ) never rises from round to round.

    Args:
        weight_OI: float32 (O, I), not changed; O may be 0.
        moment_II: H, float32 (I, I), symmetric; not changed. All zeros (inputs never seen) means white inputs, where
            the result is plain binarization: sign and mean.
        groups: G, divides I.
        rounds: ≥ 0, over all groups; 0 is plain binarization. The paper has 15. With `compensate` each group is done
            once, whatever the rounds: its one scale is then exact.
        compensate: hand each group's error to the columns behind it, by least squares.
        damping: share of mean(diag H) added to its diagonal for the compensation only.

    Returns:
        New tensors: signs (O, I) of ±1 (zero counts as +1) and scales (O, G) ≥ 0.
    """
    weight_OI = weight_OI.contiguous()  # GPT-2's comes as a transposed view
    if compensate:
        return _compensated(weight_OI, moment_II, groups, damping)
    signs, plain = _plain(weight_OI, groups)
    scales = plain.clone()
    width = weight_OI.shape[1] // groups
    grouped_OGJ = signs.view(len(signs), groups, width)
    for _ in range(rounds):
        for g in range(groups):
            here = slice(g * width, (g + 1) * width)
            scales[:, g] = 0.0
            rest_OI = weight_OI - (grouped_OGJ * scales.unsqueeze(-1)).view_as(weight_OI)
            pull_OJ = rest_OI @ moment_II[:, here]
            scales[:, g] = _output_scale(signs[:, here], pull_OJ, moment_II[here, here], plain[:, g])
    return signs, scales


def _plain(weight_OI: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Where the shift-free refinement stays: sign(w), (O, I), and the mean of |w| in each group, (O, G)."""
    rows, columns = weight_OI.shape
    return torch.where(weight_OI >= 0, 1.0, -1.0), weight_OI.reshape(rows, groups, columns // groups).abs().mean(-1)


def _output_scale(signs_OJ: Tensor, pull_OJ: Tensor, moment_JJ: Tensor, otherwise_O: Tensor) -> Tensor:
    """argmin over α ≥ 0 of the outputs' distance for one group, (O,).

    Args:
        signs_OJ: the group's signs.
        pull_OJ: (w − what the other groups give) H, at the group's columns.
        moment_JJ: the group's block of H.
        otherwise_O: the scale of rows whose outputs do not depend on it.
    """
    curvature_O = ((signs_OJ @ moment_JJ) * signs_OJ).sum(1)
    seen = curvature_O > NEGLIGIBLE * moment_JJ.diagonal().sum()
    return torch.where(seen, (signs_OJ * pull_OJ).sum(1) / curvature_O, otherwise_O).clamp_min(0.0)


def _compensated(weight_OI: Tensor, moment_II: Tensor, groups: int, damping: float) -> tuple[Tensor, Tensor]:
    """Group after group; behind each, the columns still free move by −E U_gg⁻¹ U_g,rest (E: the group's error).

    That is their exact least-squares answer; the released code divides by the diagonal of U_gg alone.
    """
    current, factor = weight_OI.clone(), inverse_factor(moment_II, damping)
    columns, width, signs, scales = weight_OI.shape[1], weight_OI.shape[1] // groups, [], []
    for first in range(0, columns, width):
        here, behind = slice(first, first + width), slice(first + width, columns)
        own, block = current[:, here], moment_II[here, here]
        group_signs, mean = _plain(own, 1)
        scale = _output_scale(group_signs, own @ block, block, mean[:, 0])
        signs.append(group_signs)
        scales.append(scale)
        error = own - group_signs * scale[:, None]
        answer = torch.linalg.solve_triangular(factor[here, here], factor[here, behind], upper=True)
        current[:, behind] -= error @ answer
    return torch.cat(signs, dim=1), torch.stack(scales, dim=1)
