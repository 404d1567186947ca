"""Owns the report: what a job's numbers mean, as JSON and as a page that needs nothing else. Measures nothing itself.

report.json, field by field:

data          how text was read: tokenizer, whether it begins with BOS, contexts, sha256 of the training text
dtype         of activations and full-precision weights while evaluating
perplexity[]  per evaluation set: `protocol`, predicted `tokens`, the perplexity of the `teacher`, of `plain`
              sign × mean, after BNN `init` and of the packed file (`kbop`); `kl_to_teacher` (nats per token)
              and `teacher_top1_agreement` (share of positions) of the packed file; null: beyond any number
bits          `binary_weights`; `bits_per_binary_weight`: signs and scales over the weights they stand for;
              `bits_per_parameter_file`: the whole weights file over all parameters; numbers of `binary_layers`
              and of `kept` linear layers
size          bytes of all weights in the source's dtype, bytes of the packed weights file, their ratio
time          seconds of each stage (in the attempt that finished it) and their sum; the report is written
              inside `evaluate`, whose own time is up to then
memory        peaks of the last attempt's ranks; bytes per binary weight that training holds on one rank
              between steps
training      steps, tokens, and the curve (at most 400 points) of loss (KL to the teacher, nats per token) and
              flip rate
samples       greedy continuations
"""

from __future__ import annotations

import io
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from safetensors import safe_open

from jobs.stages.step_metrics import read_metrics
from jobs.workspace import Workspace
from kbop_core.checkpoint import WEIGHTS_FILE, write_json
from kbop_core.hf import source_dtype

#: Points of the curves in a report.
CURVE_POINTS = 400
_KINDS = {"teacher": "teacher", "plain": "plain sign × mean", "init": "start, before training", "kbop": "KBOP"}
_PACKAGES = ("kbop", "torch", "deepspeed", "transformers")


def write_report(
    space: Workspace, perplexity: Sequence[dict[str, Any]], samples: Sequence[dict[str, str]], memory: dict[str, Any]
) -> None:
    """Write report.json and report.html of a job whose packed checkpoint is on disk."""
    report = build_report(space, perplexity, samples, memory)
    folder = space.folder("report")
    write_json(folder / "report.json", report)
    (folder / "report.html").write_text(render(report), encoding="utf-8")


def build_report(
    space: Workspace, perplexity: Sequence[dict[str, Any]], samples: Sequence[dict[str, str]], memory: dict[str, Any]
) -> dict[str, Any]:
    """The report as plain data; fields as in this module's head."""
    training, stages = space.facts("train"), _stage_seconds(space)
    metrics = read_metrics(space.metrics_file) if space.steps else []
    stride = -(-len(metrics) // CURVE_POINTS) or 1
    state = training.get("state_bytes_per_binary_weight")
    return {
        "job_id": space.job_dir.name,
        "model": space.spec.model,
        "created_at": time.time(),
        "spec": space.spec.model_dump(mode="json"),
        "spec_sha256": space.spec.digest(),
        "data": space.facts("prepare"),
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "ranks": space.gang.size,
        "device": space.device.type,
        "dtype": str(next(space.teacher.parameters()).dtype).removeprefix("torch."),
        "attempts": space.attempt,
        "perplexity": list(perplexity),
        "bits": _bits(space),
        "size": _size(space),
        "time": {"stages": stages, "total_s": sum(stages.values())},
        "memory": memory | {"training_state_bytes_per_binary_weight": state},
        "training": {
            "steps": training["steps"],
            "tokens": training["tokens"],
            "tokens_per_step": training.get("tokens_per_step"),
            "curve": [{k: m[k] for k in ("step", "loss", "flip_rate")} for m in metrics[::stride]],
        },
        "samples": list(samples),
    }


def _stage_seconds(space: Workspace) -> dict[str, float]:
    stages = {name: space.facts(name).get("seconds") for name in ("prepare", "init", "train", "pack")}
    known = {name: round(s, 3) for name, s in stages.items() if s is not None}
    return known | {"evaluate": round(space.journal.seconds_in_stage(), 3)}


def _bits(space: Workspace) -> dict[str, Any]:
    plan, stored, parameters = space.plan, 0, sum(p.numel() for p in space.teacher.parameters())
    with safe_open(space.work / "packed" / WEIGHTS_FILE, framework="pt") as file:
        for entry in plan.binary:
            for part in ("weight", "weight_scale"):
                tensor = file.get_tensor(f"{entry.name}.{part}")
                stored += tensor.numel() * tensor.element_size()
    return {
        "binary_weights": plan.weights,
        "bits_per_binary_weight": 8 * stored / plan.weights,
        "bits_per_parameter_file": 8 * _weights_file(space).stat().st_size / parameters,
        "binary_layers": len(plan.binary),
        "kept": len(plan.kept),
    }


def _size(space: Workspace) -> dict[str, Any]:
    dtype = source_dtype(space.teacher, space.model_source.location, space.model_source.revision)
    before = sum(p.numel() for p in space.teacher.parameters()) * dtype.itemsize
    after = _weights_file(space).stat().st_size
    return {"teacher_bytes": before, "packed_bytes": after, "ratio": before / after}


def _weights_file(space: Workspace) -> Path:
    return space.work / "packed" / WEIGHTS_FILE


def render(report: dict[str, Any]) -> str:
    """The report as one HTML page with inline plots and no outside references."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jobs"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    plots = [_perplexity_plot(report["perplexity"])]
    if report["training"]["curve"]:
        plots += [
            _curve_plot(report["training"]["curve"], "loss", "KL to the teacher, nats per token"),
            _curve_plot(report["training"]["curve"], "flip_rate", "share of signs flipped in a step"),
        ]
    return environment.get_template("report.html.j2").render(report=report, kinds=_KINDS, plots=plots)


def _perplexity_plot(rows: Sequence[dict[str, Any]]) -> str:
    figure = Figure(figsize=(7, 1.2 + 0.9 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for offset, (kind, label) in enumerate(_KINDS.items()):
        places = [row + 0.2 * offset for row in range(len(rows))]
        values = [row[kind] for row in rows]
        bars = axes.barh(places, [v or 1.0 for v in values], height=0.18, label=label)
        axes.bar_label(bars, ["infinite" if v is None else f"{v:.4g}" for v in values], padding=3, fontsize=8)
    axes.set_yticks([row + 0.3 for row in range(len(rows))], [row["set"] for row in rows])
    axes.set(xscale="log", xlabel="perplexity (logarithmic; less is better)")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=4)
    return _svg(figure, "Perplexity of each model on each evaluation set")


def _curve_plot(curve: Sequence[dict[str, float]], key: str, label: str) -> str:
    figure = Figure(figsize=(7, 2.4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([p["step"] for p in curve], [p[key] for p in curve], linewidth=1.2)
    axes.set(xlabel="step")
    axes.set_title(label, fontsize=10, loc="left")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    return _svg(figure, f"{label} over training steps")


def _svg(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "kbop"}):
        figure.savefig(buffer, format="svg", metadata={"Title": title, "Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
