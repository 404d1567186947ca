"""Owns what every stage of one job shares: its spec, its folders, its ranks, its loaded models. Does no stage's work.

work/
  stages/<stage>.json            done markers, written last
  tokens/source-<i>/             token files of a training source (kbop_core/token_files.py)
  tokens/eval-<i>.safetensors
  init/student.safetensors       after BNN Init and block-wise reconstruction
  train/checkpoints/, targets/, metrics.jsonl, micro_batch.json, student.safetensors
  packed/                        the checkpoint that is published
  report/report.json, report.html
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from jobs.journal import Journal
from jobs.json_files import read_json
from jobs.layout import training_metrics
from jobs.sources import ModelSource, locate_model
from jobs.spec import JobSpec, weights_of
from jobs.stop import Stop
from kbop_core.convert import ConversionPlan, plan_conversion
from kbop_core.errors import DamagedTokens, UnsupportedModel
from kbop_core.hf import Model, Tokenizer, load_lazily, load_model, load_tokenizer
from kbop_core.loop import StepLayout, layout_steps
from kbop_core.shard import Gang
from kbop_core.text import Windows
from kbop_core.window_source import StoredWindows, open_windows

#: After which ranks that wait for each other outside training give up, seconds. Rank 0 alone packs, for one.
GANG_TIMEOUT_S = 7200.0


@dataclass
class Workspace:
    """One rank's view of a job.

    Attributes:
        job_dir: of the job.
        spec: what was asked.
        attempt: number of this attempt, from 1.
        gang: the ranks.
        device: of the models.
        journal: where progress goes; silent but on rank 0.
        stop: whether the runner asked us to stop (SIGTERM), and when that may end the process.
    """

    job_dir: Path
    spec: JobSpec
    attempt: int
    gang: Gang
    device: torch.device
    journal: Journal
    stop: Stop = field(default_factory=Stop)

    @property
    def work(self) -> Path:
        """Folder of the stages' outputs."""
        return self.job_dir / "work"

    def folder(self, name: str) -> Path:
        """A stage's folder, made when missing."""
        path = self.work / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def leads(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.gang.rank == 0

    @cached_property
    def model_source(self) -> ModelSource:
        """Where the model comes from."""
        return locate_model(self.spec.model)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return load_tokenizer(self.model_source.location, self.model_source.revision)

    @cached_property
    def teacher(self) -> Model:
        """The model as it was given, frozen: float32 on CPUs, bfloat16 on GPUs. Loaded once per process."""
        return self.fresh_model()

    def forget_teacher(self) -> None:
        """Let go of the teacher; the next stage that asks for it loads it again."""
        _ = self.plan  # later, in an attempt that goes on, it would load the teacher once more, and keep it
        self.__dict__.pop("teacher", None)

    def fresh_model(self) -> Model:
        """Another copy of the model as it was given, to be changed; its blocks stay on disk if the spec says so."""
        source, resources = self.model_source, self.spec.resources
        if resources.offload == "blocks" or resources.teacher != "resident":
            return load_lazily(source.location, source.revision, self.dtype, self.device)
        return self.whole_model()

    def whole_model(self) -> Model:
        """Another copy of the model as it was given, all of it in memory."""
        source = self.model_source
        return load_model(source.location, source.revision, self.dtype).to(self.device)

    def model_to_binarize(self) -> Model:
        """A copy whose blocks are read one by one when they are made binary, so that it is never whole in memory.

        A model whose files do not allow that (load_lazily) is loaded whole.
        """
        source = self.model_source
        try:
            return load_lazily(source.location, source.revision, self.dtype, self.device)
        except UnsupportedModel:
            return self.fresh_model()

    @property
    def dtype(self) -> torch.dtype:
        """Of the models' floating-point weights."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @cached_property
    def plan(self) -> ConversionPlan:
        """Which layers become binary."""
        return plan_conversion(self.teacher, self.spec.group_size, self.spec.keep)

    def facts(self, stage: str) -> dict[str, Any]:
        """What a finished stage wrote into its marker; empty when it has none."""
        return read_json(self.work / "stages" / f"{stage}.json") or {}

    @cached_property
    def layout(self) -> StepLayout:
        """How a training step is dealt to the ranks."""
        method, resources = self.spec.method, self.spec.resources
        prepared = self.facts("prepare")
        most = min(resources.max_micro_batch, self.micro_batch_limit)
        windows = prepared.get("windows_per_step")
        return layout_steps(method.batch_tokens, prepared["context"], self.gang.size, most, windows)

    @property
    def micro_batch_limit(self) -> int:
        """Windows that fit into a micro-step, as far as an attempt that ran out of memory has found out."""
        return int((read_json(self.micro_batch_file) or {}).get("windows", self.spec.resources.max_micro_batch))

    @property
    def micro_batch_file(self) -> Path:
        """Written by a rank that ran out of memory, for the next attempt."""
        return self.work / "train" / "micro_batch.json"

    @property
    def steps(self) -> int:
        """Training steps; 0 when nothing end to end was asked."""
        return -(-self.spec.train_tokens // self.layout.tokens)

    def token_folder(self, number: int) -> Path:
        """Token files of a training source."""
        return self.work / "tokens" / f"source-{number}"

    @cached_property
    def windows(self) -> StoredWindows:
        """The training windows in the order of the run; the ranks have compared their files with the digests.

        Raises:
            DamagedTokens: a file is not what stage `prepare` wrote; the next attempt runs that stage again.
        """
        try:
            windows = self.open_windows(self.facts("prepare")["context"])
            windows.verify(self.gang.rank, self.gang.size)
        except DamagedTokens:
            (self.work / "stages" / "prepare.json").unlink(missing_ok=True)
            raise
        return windows

    def open_windows(self, context: int) -> StoredWindows:
        """The training windows that the ranks tokenised, as they are on disk.

        Raises:
            TextTooShort: no full window; in a mixture, of any source.
            DamagedTokens: a source has no index.
        """
        sources, _ = self.spec.resolved_data()
        folders = [self.token_folder(number) for number in range(len(sources))]
        return open_windows(folders, [s.source for s in sources], weights_of(sources), context, self.spec.seed)

    @property
    def metrics_file(self) -> Path:
        """What stage `train` writes about each step."""
        return training_metrics(self.job_dir)

    @property
    def init_student(self) -> Path:
        """The student before training."""
        return self.work / "init" / "student.safetensors"

    @property
    def final_student(self) -> Path:
        """The student that is packed: the trained one, or the initial one when nothing was trained."""
        return self.work / "train" / "student.safetensors" if self.steps else self.init_student

    def evaluation_sets(self) -> list[tuple[str, Windows]]:
        """Name and windows of each evaluation set."""
        from safetensors.torch import load_file

        sets = []
        for number, described in enumerate(self.facts("prepare")["evaluation"]):
            tensors = load_file(self.work / "tokens" / f"eval-{number}.safetensors")
            windows = Windows(tensors["ids"], tensors["lengths"], described["protocol"])
            sets.append((described["set"], windows))
        return sets
