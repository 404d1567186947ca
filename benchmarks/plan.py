"""`make bench-plan`: the memory that `kbop plan` foretells beside the memory that ranks really take.

Every configuration trains a LLaMA shape with random weights for two steps (from the second on, AdamW's moments are
there) in fresh processes, one per rank, on one thread each. What is compared is a rank's resident memory:

    measured = the kernel's peak (VmHWM, reset through /proc/self/clear_refs) − what was resident before the models

Before the models a tiny one trains one step, so that the code and buffers of the libraries, which no plan counts, are
part of what is subtracted; the row shows how much that is. glibc is told (MALLOC_*_THRESHOLD_) to give every block of
64 KiB or more back to the kernel as soon as it is freed: the peak is that of living tensors, not of a free list.
Models come from a saved checkpoint as a job's do: the student block by block, the teacher as its placement says.
Building and training are measured apart, each beside its own moment of the plan. Linux only. The rows also replace the
table between the markers in docs/plan.md.
"""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.record import claim, fill, markdown, publish
from jobs.memory_plan import MemoryPlan
from jobs.model_shape import shape_of_config
from jobs.plan_request import PlanRequest, TeacherPlacement
from jobs.process import free_port
from jobs.stages.teacher import BATCH_LOGITS
from kbop_core.convert import convert_plain, plan_conversion
from kbop_core.engine import barrier, gang_of_ranks, share_frozen
from kbop_core.hf import Model, load_lazily, load_model
from kbop_core.loop import StepLayout, TrainConfig, start_run, train
from kbop_core.shard import Gang
from kbop_core.target_cache import TargetCache
from kbop_core.teacher import CachedTeacher, LiveTeacher, Teacher
from kbop_core.window_source import WindowsInMemory

STEPS = 2
#: Windows there are: a whole file of a cached teacher.
WINDOWS = 64
#: A configuration whose ranks take longer than this hangs, seconds.
LIMIT_S = 300
#: Freed blocks from this size on go back to the kernel at once, bytes.
RETURN_FROM = "65536"
MIB = 2**20
DOCUMENT = Path(__file__).parents[1] / "docs" / "plan.md"
COMMAND = "make bench-plan"


@dataclass(frozen=True)
class Configuration:
    """One shape and the way it is trained; head size 64."""

    name: str
    hidden: int = 512
    ffn: int = 1408
    blocks: int = 6
    kv_heads: int = 8
    vocabulary: int = 2048
    tied: bool = True
    ranks: int = 1
    micro_batch: int = 2
    context: int = 256
    micro_steps: int = 1
    zero_stage: Literal[0, 1, 2, 3] = 1
    evidence: Literal["bfloat16", "int8"] = "bfloat16"
    teacher: TeacherPlacement = "resident"
    checkpointing: bool = False
    flip_rate: float = 0.004
    whole: bool = True  # a cached teacher's targets are written from memory

    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        return {
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.hidden // 64,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.context,
            "tie_word_embeddings": self.tied,
        }

    def planned_making(self) -> int:
        """Most bytes that the plan says before training."""
        planned = self.planned()
        moments = planned.making
        if self.teacher == "cached" and self.whole:
            moments = (planned.targets_from_memory, *moments[1:])
        return max(moment.bytes for moment in moments)

    def planned(self) -> MemoryPlan:
        """What the plan says."""
        request = PlanRequest(
            ranks=self.ranks,
            device="cpu",
            micro_batch=self.micro_batch,
            context=self.context,
            micro_steps=self.micro_steps,
            evidence=self.evidence,
            zero_stage=self.zero_stage,
            teacher=self.teacher,
            activation_checkpointing=self.checkpointing,
            flip_rate=self.flip_rate,
        )
        return MemoryPlan(shape_of_config(self.config(), self.name), request)


CONFIGURATIONS = (
    Configuration("1 rank"),
    Configuration("long windows", micro_batch=1, context=1024, blocks=4),
    Configuration("large vocabulary, untied", vocabulary=16_384, tied=False, blocks=4),
    Configuration("grouped queries, 2 micro-steps", kv_heads=2, micro_steps=2, blocks=4),
    Configuration("25 M weights, short windows", blocks=8, micro_batch=1, context=64),
    Configuration("int8 evidence, ZeRO 0", evidence="int8", zero_stage=0, blocks=4),
    Configuration("large embedding, short windows", vocabulary=16_384, tied=False, blocks=2, micro_batch=1, context=16),
    Configuration("2 ranks", ranks=2),
    Configuration("2 ranks, ZeRO 2, 2 micro-steps", ranks=2, zero_stage=2, micro_steps=2, blocks=4, context=128),
    Configuration("2 ranks, 25 M weights, short windows", ranks=2, blocks=8, micro_batch=1, context=64),
    Configuration("5 % flips, short windows", flip_rate=0.05, micro_batch=1, context=64),
    Configuration("2 ranks, 5 % flips, short windows", ranks=2, flip_rate=0.05, micro_batch=1, context=64),
    Configuration("2 ranks, int8 evidence, short windows", ranks=2, evidence="int8", micro_batch=1, context=64),
    Configuration("2 ranks, ZeRO 3, large embedding", ranks=2, zero_stage=3, vocabulary=16_384, tied=False, blocks=2),
    Configuration("2 ranks, ZeRO 3, short windows", ranks=2, zero_stage=3, micro_batch=1, context=64),
    Configuration("checkpointing, long windows", checkpointing=True, micro_batch=1, context=1024),
    Configuration("teacher offloaded, checkpointing", teacher="offloaded", checkpointing=True),
    Configuration("teacher cached, checkpointing", teacher="cached", checkpointing=True),
    Configuration("teacher cached, its blocks on disk", teacher="cached", whole=False, blocks=8, context=128),
    Configuration("2 ranks, teacher sharded", ranks=2, teacher="sharded", context=128),
)
TINY = Configuration("tiny", hidden=64, ffn=128, blocks=1, kv_heads=1, vocabulary=256, micro_batch=1, context=32)


# -- one rank ---------------------------------------------------------------------------------------------------------


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak since the last reset) of this process, bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    if found is None:
        raise OSError(f"/proc/self/status has no {field}: this benchmark runs on Linux only")
    return int(found[1]) * 1024


def reset_peak() -> None:
    """VmHWM ← VmRSS."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def run_once(config: Configuration, gang: Gang, checkpoint: Path) -> dict[str, int]:
    """Peaks while the models are made and while they train, bytes beyond what was resident before."""
    gc.collect()
    before = resident("VmRSS")
    reset_peak()
    layout = StepLayout(
        config.context, config.micro_batch * config.micro_steps * config.ranks, config.ranks, config.micro_batch
    )
    rng = torch.Generator().manual_seed(0)
    windows = WindowsInMemory(torch.randint(0, config.vocabulary, (WINDOWS, config.context), generator=rng), 0)
    held = [_load(config, checkpoint)]
    plan = plan_conversion(held[0], 128)
    teacher = _teacher(config, held, windows, gang, checkpoint)
    student = load_lazily(str(checkpoint), None, torch.float32, torch.device("cpu"))
    convert_plain(student, plan, trainable=True)
    built = resident("VmHWM")
    gc.collect()
    reset_peak()
    settings = TrainConfig(
        steps=10,
        zero_stage=config.zero_stage,
        evidence=config.evidence,
        activation_checkpointing=config.checkpointing,
        flip_rate=config.flip_rate,
    )
    run = start_run(student, teacher, windows, settings, layout, gang)
    for _ in train(run, range(STEPS)):
        pass
    run.engine.close()
    return {"before": before, "build": built - before, "train": resident("VmHWM") - before}


def _load(config: Configuration, checkpoint: Path) -> Model:
    """The teacher as stage `train` finds it: whole if it will be resident, else with its blocks on disk."""
    if config.teacher == "resident":
        model = load_model(str(checkpoint))
        for parameter in model.parameters():  # its pages are in memory once they are read, as after stage `init`
            parameter.sum()
        return model
    return load_lazily(str(checkpoint), None, torch.float32, torch.device("cpu"))


def _teacher(
    config: Configuration, held: list[Model], windows: WindowsInMemory, gang: Gang, checkpoint: Path
) -> Teacher:
    """The teacher of the placement, from the one that is held, as jobs/stages/teacher.py makes it."""
    if config.teacher == "sharded":
        return LiveTeacher(share_frozen(held.pop()))
    if config.teacher == "cached":
        cache = TargetCache(checkpoint / "targets", range(len(windows)))
        batch = max(1, BATCH_LOGITS // (config.vocabulary * config.context))
        model = load_model(str(checkpoint)) if config.whole else held[0]
        cache.write(gang, windows.rows, LiveTeacher(model).log_probs, batch)
        held.clear()
        barrier(gang)
        return CachedTeacher(cache)
    return LiveTeacher(held.pop())


def tiny_of(config: Configuration) -> Configuration:
    """The warm-up: little memory, and the libraries that `config` uses."""
    return replace(
        TINY,
        ranks=config.ranks,
        zero_stage=config.zero_stage,
        evidence=config.evidence,
        teacher=config.teacher,
        checkpointing=config.checkpointing,
        whole=config.whole,
    )


def save_model(config: Configuration, folder: Path) -> None:
    """A checkpoint with random weights."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**config.config())).save_pretrained(folder)


def rank_main(config: Configuration, out: Path) -> None:
    """What one rank does: a warm-up, the run, its figures as JSON."""
    torch.set_num_threads(1)
    with gang_of_ranks("cpu", 120) as gang:
        run_once(tiny_of(config), gang, out / "tiny")
        figures = run_once(config, gang, out / "model")
        (out / f"{gang.rank}.json").write_text(json.dumps(figures), encoding="utf-8")


# -- all of them ------------------------------------------------------------------------------------------------------


def measure(config: Configuration) -> dict[str, int]:
    """The largest figures over the ranks of one configuration."""
    fixed = {
        "MALLOC_MMAP_THRESHOLD_": RETURN_FROM,
        "MALLOC_TRIM_THRESHOLD_": RETURN_FROM,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "WORLD_SIZE": str(config.ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    with tempfile.TemporaryDirectory() as folder:
        save_model(tiny_of(config), Path(folder) / "tiny")
        save_model(config, Path(folder) / "model")
        command = [sys.executable, "-m", "benchmarks.plan", json.dumps(asdict(config)), folder]
        ranks = [
            subprocess.Popen(command, env=os.environ | fixed | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(config.ranks)
        ]
        try:
            codes = [rank.wait(LIMIT_S) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        if any(codes):
            raise RuntimeError(f"ranks of {config.name!r} ended with {codes}")
        found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(Path(folder).glob("*.json"))]
    return {key: max(figures[key] for figures in found) for key in found[0]}


def row(config: Configuration) -> dict[str, Any]:
    """One configuration, measured and planned, MiB."""
    measured, planned = measure(config), config.planned()
    build, training = config.planned_making(), planned.training_peak.bytes
    return {
        "name": config.name,
        "weights": planned.binary_weights,
        "libraries": round(measured["before"] / MIB),
        "build": round(build / MIB, 1),
        "measured build": round(measured["build"] / MIB, 1),
        "build ratio": round(measured["build"] / build, 3),
        "peak at": planned.training_peak.name,
        "peak": round(training / MIB, 1),
        "measured peak": round(measured["train"] / MIB, 1),
        "peak ratio": round(measured["train"] / training, 3),
    }


def main() -> None:
    rows = [row(config) for config in CONFIGURATIONS]
    claims = [
        claim(f"{words}, |measured / planned - 1|: {r['name']}", abs(r[key] - 1), "share", "<= 0.10")
        for r in rows
        for words, key in (("training", "peak ratio"), ("building", "build ratio"))
    ]
    publish("plan", COMMAND, rows, claims)
    fill(DOCUMENT, {"validation": markdown(rows)}, COMMAND)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        rank_main(Configuration(**json.loads(sys.argv[1])), Path(sys.argv[2]))
    else:
        main()
