"""Owns the second moments of a layer's gradient: r over rows, c over columns, and how they are measured.

Refuses to know what they are for (kbop.py). Squares do not add up over micro-steps and ranks, but projections do: with
Ω a matrix of random ±1, mean_j g²_ij = E[(g Ω)²_ik]/I. So r and c are measured on `PROBES` projections of rows and
columns, summed like gradients, and no rank ever holds the whole gradient of a step (measured beside exact ones:
docs/quality.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Decay ρ of the second moments (at most 1 − 1/(t+1): the first ones must not linger; docs/quality.md).
MOMENT_DECAY = 0.98
#: Random projections that measure them: one step's estimate is off by √(2/16), their average by 5 %.
PROBES = 16


def random_signs(count: int) -> Tensor:
    """Ω: float32 (count, PROBES) of ±1, the same on every rank and device."""
    bits = torch.randint(0, 2, (count, PROBES), generator=torch.Generator().manual_seed(0))
    return bits.mul_(2).sub_(1).float()


def mean_squares(sketch_RP: Tensor, over: Tensor | float) -> Tensor:
    """Mean over the projections of their squares, divided by `over`: float32 (R,); NaN where one was not finite.

    Finite ones beyond what float32 can hold give its largest number.

    Args:
        sketch_RP: projections, summed over ranks.
        over: numbers that were projected times the square of the number of ranks; one for all rows or one for each.
    """
    squares = sketch_RP.double().square_().mean(1) / over
    most = torch.finfo(torch.float32).max
    return torch.where(squares.isfinite(), squares.clamp_max(most), torch.nan).float()


class Moments:
    """r of one rank's rows and c of one layer, with the projections of the step that is under way.

    Args:
        rows: this rank's rows of the layer.
        width, height: I and O.
        device: of the tensors.

    Attributes:
        row: r, float32 (R,), mean square of the gradient over each of this rank's rows.
        column: c, float32 (I,), over each column, equal on all ranks.
    """

    def __init__(self, rows: slice, width: int, height: int, device: torch.device) -> None:
        self.rows, self.height, self.width = rows, height, width
        self.row = torch.zeros(rows.stop - rows.start, dtype=torch.float32, device=device)
        self.column = torch.zeros(width, dtype=torch.float32, device=device)
        self._sketches: tuple[Tensor, Tensor] | None = None  # between two steps there are none

    def _begun(self) -> tuple[Tensor, Tensor]:
        if self._sketches is None:
            self._sketches = self.row.new_zeros(len(self.row), PROBES), self.row.new_zeros(PROBES, self.width)
        return self._sketches

    @property
    def row_sketch(self) -> Tensor:
        """Sum of g Ω over the micro-steps so far, float32 (R, PROBES)."""
        return self._begun()[0]

    @property
    def column_sketch(self) -> Tensor:
        """This rank's part of Ωᵀ g, float32 (PROBES, I)."""
        return self._begun()[1]

    def project(self, gradient_RI: Tensor, probes: Tensor) -> None:
        """Take in one micro-step's gradient of this rank's rows, float32, summed over ranks."""
        self.row_sketch.addmm_(gradient_RI, probes[: self.width])
        self.column_sketch.addmm_(probes[self.rows].t(), gradient_RI)

    def update(self, column_squares: Tensor, ranks: int, steps_done: int) -> None:
        """Fold the step's projections into r and c, and forget them.

        Args:
            column_squares: float32 (I,), `mean_squares` of Ωᵀ g of all ranks over O.
            ranks: whose gradients were summed; the moments are those of their mean.
            steps_done: steps before this one.
        """
        gain = max(1.0 - MOMENT_DECAY, 1.0 / (steps_done + 1))  # a plain mean while there are few
        self.row.lerp_(mean_squares(self.row_sketch, self.width * ranks**2), gain)
        self.column.lerp_(column_squares, gain)
        self.forget()

    def forget(self) -> None:
        """Drop the projections: of a step that was folded in, or of one that is not finished."""
        self._sketches = None
