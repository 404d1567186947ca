"""Stage `evaluate`: the packed file as loaded from disk, beside its teacher, plain binarization and its start. Writes
the report.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from jobs.report import write_report
from jobs.stages.step_metrics import peak_resident_bytes
from jobs.workspace import Workspace
from kbop_core.checkpoint import load_student
from kbop_core.convert import convert_plain
from kbop_core.hf import Model, generate, load_model, vocabulary_size
from kbop_core.lazy import blocks_on_disk
from kbop_core.perplexity import Quality
from kbop_core.perplexity import evaluate as score
from kbop_core.text import Windows

#: Logits in one forward pass of the evaluation, about: 2^25 float32 are 128 MiB, and six such tensors live at once.
BATCH_LOGITS = 2**25
#: Models that are scored: see `_models`.
MODELS = 4
#: Tokens of a prompt and of its continuation in the report's samples, and how many samples.
PROMPT_TOKENS, SAMPLE_TOKENS, SAMPLES = 16, 48, 3


def evaluate(space: Workspace) -> dict[str, Any]:
    """Score every model on every set, and write report.json and report.html."""
    sets = space.evaluation_sets()
    rows: list[dict[str, Any]] = [{"set": name, "protocol": w.protocol, "tokens": w.predicted} for name, w in sets]
    packed: Model | None = None
    told = Told(space, MODELS * sum(len(windows.ids_NT) for _, windows in sets))
    for kind, model in _models(space):
        packed = model if kind == "kbop" else packed
        for row, (_, windows) in zip(rows, sets, strict=True):
            quality = _score(told, model, windows, compare=kind == "kbop")
            row[kind] = quality.perplexity if math.isfinite(quality.perplexity) else None  # JSON has no infinity
            if kind == "kbop":
                row["kl_to_teacher"] = quality.kl_to_teacher
                row["teacher_top1_agreement"] = quality.top1_agreement
    memory = _peak_memory(space)
    if space.leads:
        assert packed is not None
        write_report(space, rows, _samples(space, packed, sets), memory)
    return {"perplexity": rows}


def _models(space: Workspace) -> Iterator[tuple[str, nn.Module]]:
    """(name in the report, model), one at a time so that at most two are in memory beside the teacher."""
    yield "teacher", space.teacher
    plain = space.fresh_model()
    convert_plain(plain, space.plan, trainable=True)
    yield "plain", plain
    load_student(plain, space.init_student)
    yield "init", plain
    dtype = next(space.teacher.parameters()).dtype
    yield "kbop", load_model(str(space.work / "packed"), dtype=dtype).to(space.device)


@dataclass
class Told:
    """How far the evaluation is, in windows of all models, told batch by batch: a large set takes hours."""

    space: Workspace
    windows: int
    done: int = 0

    def part(self, windows: int, done: int, batches: int) -> None:
        """Of the set that is being scored, which has that many windows, `done` of this rank's batches are."""
        self.space.journal.progress(self.done + windows * done // batches, self.windows)


def _score(told: Told, model: nn.Module, windows: Windows, compare: bool) -> Quality:
    space, count = told.space, len(windows.ids_NT)
    batch = max(1, min(32, BATCH_LOGITS // (vocabulary_size(space.teacher) * windows.ids_NT.shape[1])))
    quality = score(model, windows, batch, space.teacher if compare else None, space.gang, partial(told.part, count))
    told.done += count
    return quality


def _samples(space: Workspace, packed: Model, sets: list[tuple[str, Windows]]) -> list[dict[str, str]]:
    """Greedy continuations of the starts of evaluation windows, by the teacher and by the packed model.

    A teacher whose blocks are on disk would be read once for every token: it is left out.
    """
    models = {"kbop": packed} if blocks_on_disk(space.teacher) else {"teacher": space.teacher, "kbop": packed}
    windows = sets[0][1]
    rows = range(0, len(windows.ids_NT), max(1, len(windows.ids_NT) // SAMPLES))[:SAMPLES]
    starts = [windows.ids_NT[row, : min(PROMPT_TOKENS, int(windows.lengths_N[row]))] for row in rows]
    prompts = [space.tokenizer.decode(start, skip_special_tokens=True) for start in starts]
    return [
        {"prompt": prompt}
        | {name: generate(model, space.tokenizer, prompt, SAMPLE_TOKENS) for name, model in models.items()}
        for prompt in prompts
        if prompt.strip()
    ]


def _peak_memory(space: Workspace) -> dict[str, Any]:
    """Peak memory of this attempt's ranks so far: resident bytes of all ranks, and the largest rank's GPU bytes."""
    resident = torch.tensor([float(peak_resident_bytes())], dtype=torch.float64)
    total = space.gang.sum(resident.to(space.device))
    cuda = None
    if space.device.type == "cuda":
        peak = torch.tensor([float(torch.cuda.max_memory_allocated())], device=space.device)
        cuda = int(space.gang.max(peak))
    return {"peak_rss_bytes": int(total), "peak_cuda_bytes": cuda}
