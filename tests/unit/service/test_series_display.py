"""How a training series looks: curves of block characters, and tables with only what was recorded."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from service.series_display import curve, print_series


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([], ""),
        ([3.0], "▁"),
        ([0.0, 7.0], "▁█"),
        ([7, 6, 5, 4, 3, 2, 1, 0], "█▇▆▅▄▃▂▁"),
        ([0.1] * 5, "▁▁▁▁▁"),
        ([1.0, float(2**60)], "▁█"),
    ],
)
def test_a_curve_goes_from_the_lowest_to_the_highest_block(values: list[float], text: str) -> None:
    assert curve(values) == text


def test_a_long_curve_shows_means_of_neighbours() -> None:
    assert curve([0, 2, 4, 6, 0, 2], width=3) == "▁█▁"
    assert len(curve([float(i) for i in range(1001)])) == 40


def test_equal_numbers_are_a_flat_line_whatever_their_means_round_to() -> None:
    assert curve([0.3] * 391) == "▁" * 40


def shown(steps: list[dict[str, Any]], every: int = 1) -> str:
    out = io.StringIO()
    print_series({"job_id": "job_1", "every": every, "data": steps}, Console(file=out, width=120, highlight=False))
    return out.getvalue()


def test_numbers_that_no_step_has_are_left_out() -> None:
    text = shown([{"step": 0, "loss": 2.0}, {"step": 1}])
    assert "loss" in text and "flip rate" not in text and "forward" not in text


def test_a_thinned_series_says_so() -> None:
    assert shown([{"step": 0}, {"step": 4096}], every=2048).startswith("job_1  steps 0 to 4,096, every 2,048 steps\n")
