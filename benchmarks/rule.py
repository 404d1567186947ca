"""`make bench-rule`: does the flip rule earn its keep? stories260K, 0.4 M tokens, one seed, one thread.

Same start, data order, batch, loss (KL to the teacher), schedule and evaluation for every row: scales only (no flips),
KBOP, and latent weights with STE and AdamW, from plain binarization and from our BNN Init. About ten minutes.
A first look; the bench that sweeps every side's learning rates over models and seeds is docs/quality.md's next step.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn

from benchmarks.record import claim, publish, shared_data
from jobs.process import free_port
from kbop_core.baselines.latent import convert_latent
from kbop_core.checkpoint import load_student, save_student
from kbop_core.convert import ConversionPlan, binary_layers, convert_plain, linear_weight, plan_conversion
from kbop_core.distill import distillation_loss, teacher_logits
from kbop_core.engine import gang_of_ranks
from kbop_core.hf import load_model, load_tokenizer
from kbop_core.init.pretrained import pretrained_init
from kbop_core.loop import TrainConfig, layout_steps, start_run, train
from kbop_core.perplexity import evaluate
from kbop_core.schedules import warmup_cosine
from kbop_core.shard import Gang
from kbop_core.text import WindowOrder, evaluation_windows, read_documents, training_windows

CONTEXT, HELD_OUT, GROUP, STEPS, BATCH_TOKENS = 256, 150, 64, 195, 2048
LATENT_LR = 5e-3


class Bench:
    """What all rows share."""

    def __init__(self, folder: Path, gang: Gang) -> None:
        self.gang, self.source = gang, str(folder / "models" / "stories260K-hf")
        tokenizer = load_tokenizer(self.source)
        stories = read_documents(folder / "text" / "tinystories" / "tinystories_v2_A.jsonl")
        stories = [" ".join(story.split()) for story in stories]
        self.windows = training_windows(stories[:-HELD_OUT], tokenizer.encode, CONTEXT, "TinyStories A")
        self.held_out = evaluation_windows(stories[-HELD_OUT:], tokenizer.encode, CONTEXT, "TinyStories A")
        self.teacher = load_model(self.source)
        self.plan: ConversionPlan = plan_conversion(self.teacher, GROUP)
        self.layout = layout_steps(BATCH_TOKENS, CONTEXT, 1, 8)
        self.start = Path(os.environ.get("TMPDIR", "/tmp")) / f"bench-rule-{os.getpid()}.safetensors"
        student = load_model(self.source)
        calibration = self.windows[list(WindowOrder(len(self.windows), 0).indices(0, 64))].split(32)
        pretrained_init(student, self.teacher, self.plan, calibration)
        save_student(student, self.start)

    def binary_student(self) -> nn.Module:
        student = load_model(self.source)
        convert_plain(student, self.plan, trainable=True)
        load_student(student, self.start)
        return student

    def perplexity(self, model: nn.Module) -> float:
        return evaluate(model.eval(), self.held_out, 32).perplexity

    def kbop(self, flip_rate: float) -> float:
        student = self.binary_student()
        config = TrainConfig(steps=STEPS, flip_rate=flip_rate)
        run = start_run(student, self.teacher, self.windows, config, self.layout, self.gang)
        for _ in track(train(run, range(STEPS)), total=STEPS, description=f"KBOP, flip rate {flip_rate:g}"):
            pass
        run.engine.close()
        return self.perplexity(student)

    def latent(self, from_init: bool) -> float:
        student = load_model(self.source).requires_grad_(True)
        layers = convert_latent(student, self.plan)
        if from_init:
            with torch.no_grad():
                for name, started in binary_layers(self.binary_student()).items():
                    magnitude = linear_weight(self.teacher.get_submodule(name)).abs()
                    layers[name].latent.copy_(started.signs() * magnitude)
                    layers[name].scale.copy_(started.weight_scale)
        ours = TrainConfig(steps=STEPS)
        latents = {id(layer.latent) for layer in layers.values()}
        scales = {id(layer.scale) for layer in layers.values()}
        rates = {"latent": LATENT_LR, "scale": ours.scale_lr, "other": ours.other_lr}

        def kind(parameter: Tensor) -> str:
            return "latent" if id(parameter) in latents else "scale" if id(parameter) in scales else "other"

        groups = [{"params": [p for p in student.parameters() if kind(p) == k], "lr": r} for k, r in rates.items()]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        order = WindowOrder(len(self.windows), ours.seed)
        for step in track(range(STEPS), description=f"latent STE, from {'BNN Init' if from_init else 'plain'}"):
            factor = warmup_cosine(step, STEPS, ours.warmup_steps)
            for group, rate in zip(optimizer.param_groups, rates.values(), strict=True):
                group["lr"] = factor * rate
            places = self.layout.places(step, 0, 0)
            ids = self.windows[list(order.indices(places.start, places.stop))]
            logits = student(input_ids=ids, use_cache=False).logits
            distillation_loss(logits, teacher_logits(self.teacher, ids)).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return self.perplexity(student)


def main() -> None:
    folder = shared_data()
    if folder is None:
        print("skipped: no shared data (set KBOP_SHARED_DATA)")
        return
    torch.set_num_threads(1)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(free_port())
    with gang_of_ranks("cpu", 600) as gang:
        bench = Bench(folder, gang)
        methods: dict[str, Callable[[], float]] = {
            "teacher": lambda: bench.perplexity(bench.teacher),
            "BNN Init": lambda: bench.perplexity(bench.binary_student()),
            "scales only, no flips": lambda: bench.kbop(0.0),
            f"latent STE + AdamW {LATENT_LR:g}": lambda: bench.latent(False),
            f"latent STE + AdamW {LATENT_LR:g}, BNN Init": lambda: bench.latent(True),
            "KBOP": lambda: bench.kbop(TrainConfig(steps=STEPS).flip_rate),
        }
        rows = [{"method": name, "perplexity": run()} for name, run in methods.items()]
        bench.start.unlink()
    found = {str(row["method"]): float(str(row["perplexity"])) for row in rows}
    ours, still = found["KBOP"], found["scales only, no flips"]
    peer = min(value for name, value in found.items() if name.startswith("latent"))
    claims = [
        claim("KBOP / scales only", ours / still, "ratio of perplexities", "<= 1"),
        claim("KBOP / best latent row", ours / peer, "ratio of perplexities", "<= 1"),
    ]
    publish("rule", "make bench-rule", rows, claims)


if __name__ == "__main__":
    main()
