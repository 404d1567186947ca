"""Owns the pictures beside docs/quality.md: learning curves, and flips with their reversals. Decides no number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "plots"

#: (tokens, seconds, validation perplexity) along a run.
Curve = Sequence[Sequence[float]]


def learning_curves(task: str, curves: Mapping[str, Curve], teacher: float | None) -> None:
    """Validation perplexity over tokens, one line a method."""
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for method, curve in curves.items():
        axes.plot([p[0] / 1e6 for p in curve], [p[2] for p in curve], marker="o", markersize=3, label=method)
    if teacher:
        axes.axhline(teacher, color="black", linewidth=0.8, linestyle=":", label="teacher (test half)")
    axes.set(xlabel="training tokens, millions", ylabel="validation perplexity", yscale="log", title=task)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    _save(figure, f"learning-{task}")


def flips(runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Flips in each eighth of a run, and how many of them are reversals: flips of a weight that had flipped before."""
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    share, back = figure.subplots(1, 2)
    for task, run in runs.items():
        eighths = range(1, len(run["flips"]) + 1)
        share.plot(eighths, [f for f, _ in run["flips"]], marker="o", markersize=3, label=task)
        back.plot(eighths, [b / max(1, f) for f, b in run["flips"]], marker="o", markersize=3, label=task)
    share.set(xlabel="eighth of the run", ylabel="flips", yscale="log")
    back.set(xlabel="eighth of the run", ylabel="share that are reversals", ylim=(0, 1))
    back.legend(fontsize=8)
    _save(figure, "flips")


def _save(figure: Figure, name: str) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "kbop"}):
        figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
