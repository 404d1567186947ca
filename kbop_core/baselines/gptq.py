"""Owns one-bit GPTQ (arXiv 2210.17323): columns become binary one by one, and later ones make up for the error.

Refuses to look back: a sign once chosen stays, and so does a scale. That is what fit.py does beyond it. Our own code:

    H⁻¹ = Uᵀ U,  U upper triangular                   H = E[x xᵀ], damped
    column j in natural order:  ŵ_j = α_g sign(w_j),   w_k ← w_k − (w_j − ŵ_j) U_jk / U_jj   for all k > j

which is the least-squares answer of the columns that are still free to the error just made. α_g is the mean of |w|
over the group's weights as they are when its first column is reached, with all earlier errors already in them (as
GPTQ takes its grids). Columns are taken in blocks, with one matrix product per block for the columns behind it.

For a whole model give it to the walk over blocks in init/pretrained.py in place of the fit: its objective is what the
layer does to the student's own inputs, so it wants no cross moment.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Columns taken between two matrix products; a group's start always begins a new block.
BLOCK = 64


@torch.no_grad()
def gptq_layer(weight_OI: Tensor, moment_II: Tensor, groups: int, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """Signs and scales for one layer (or any rows of it: rows do not interact).

    Args:
        weight_OI: float32 (O, I), not changed; O may be 0.
        moment_II: H, float32 (I, I), symmetric; not changed. All zeros (inputs never seen) means white inputs, where
            the result is plain binarization: sign and mean.
        groups: G, divides I.
        damping: share of mean(diag H) added to the diagonal, > 0 unless H is positive definite.

    Returns:
        New tensors: signs (O, I) of ±1 (zero counts as +1) and scales (O, G) ≥ 0.

    Raises:
        torch.linalg.LinAlgError: the damped H is not positive definite.
    """
    current_IO = weight_OI.t().contiguous().clone()  # columns of the layer are rows here
    columns, width = current_IO.shape[0], current_IO.shape[0] // groups
    factor = inverse_factor(moment_II, damping)
    signs_IO, scales = torch.empty_like(current_IO), []
    for first in range(0, columns, width):
        scale_O = current_IO[first : first + width].abs().mean(0)
        scales.append(scale_O)
        for start in range(first, first + width, BLOCK):
            stop = min(start + BLOCK, first + width)
            errors = torch.empty_like(current_IO[start:stop])
            for j in range(start, stop):
                signs_IO[j] = torch.where(current_IO[j] >= 0, 1.0, -1.0)
                errors[j - start] = (current_IO[j] - scale_O * signs_IO[j]) / factor[j, j]
                current_IO[j + 1 : stop].addr_(factor[j, j + 1 : stop], errors[j - start], alpha=-1.0)
            current_IO[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1.0)
    return signs_IO.t().contiguous(), torch.stack(scales, dim=1)


def inverse_factor(moment_II: Tensor, damping: float) -> Tensor:
    """U, upper triangular with H⁻¹ = Uᵀ U, of the damped H; a new tensor in H's dtype, computed in float64.

    For any split of the columns into those before i and the rest, U[i:, i:] is the same factor of the inverse of the
    rest's own H.

    Raises:
        torch.linalg.LinAlgError: the damped H is not positive definite.
    """
    moment = moment_II.double()
    level = moment.diagonal().mean()
    eye = torch.eye(moment.shape[0], dtype=moment.dtype, device=moment.device)
    damped = moment + damping * level * eye if float(level) > 0 else eye
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.to(moment_II.dtype)
