"""`make bench-init`: how far BNN Init alone takes a model, beside plain binarization, on one core.

stories260K (skipped without the shared data): 64 windows of 256 tokens of TinyStories A calibrate, its last 150
stories evaluate (white space collapsed, as the model's author did); three draws of calibration windows. The rows with
another `teacher_share` are the ablation behind the default.
"""

from __future__ import annotations

import statistics
import time

import torch

from benchmarks.record import claim, publish, shared_data
from kbop_core.convert import convert_plain, plan_conversion
from kbop_core.documents import read_documents
from kbop_core.hf import load_model, load_tokenizer
from kbop_core.init.fit import FitEffort
from kbop_core.init.pretrained import InitEffort, pretrained_init
from kbop_core.perplexity import evaluate
from kbop_core.text import WindowOrder, evaluation_windows, training_windows

CONTEXT, WINDOWS, HELD_OUT, GROUP, DRAWS = 256, 64, 150, 64, 3


def main() -> None:
    folder = shared_data()
    if folder is None:
        print("skipped: no shared data (set KBOP_SHARED_DATA)")
        return
    torch.set_num_threads(1)
    source = str(folder / "models" / "stories260K-hf")
    tokenizer = load_tokenizer(source)
    stories = read_documents(folder / "text" / "tinystories" / "tinystories_v2_A.jsonl")
    stories = [" ".join(story.split()) for story in stories]
    train = training_windows(stories[:-HELD_OUT], tokenizer.encode, CONTEXT, "TinyStories A")
    held_out = evaluation_windows(stories[-HELD_OUT:], tokenizer.encode, CONTEXT, "TinyStories A")
    teacher = load_model(source)
    plan = plan_conversion(teacher, GROUP)

    def perplexity(model: torch.nn.Module) -> float:
        return evaluate(model, held_out, 32).perplexity

    plain = load_model(source)
    convert_plain(plain, plan, trainable=True)
    rows: list[dict[str, object]] = [
        {"method": "teacher", "perplexity": perplexity(teacher), "seconds": 0.0, "draws": 1},
        {"method": "plain sign x mean", "perplexity": perplexity(plain), "seconds": 0.0, "draws": 1},
    ]
    for share in (0.0, 1.0, FitEffort().teacher_share):
        results, seconds = [], []
        for seed in range(DRAWS):
            student = load_model(source)
            batches = train[list(WindowOrder(len(train), seed).indices(0, WINDOWS))].split(32)
            began = time.perf_counter()
            pretrained_init(student, teacher, plan, batches, InitEffort(FitEffort(teacher_share=share)))
            seconds.append(time.perf_counter() - began)
            results.append(perplexity(student))
        rows.append(
            {
                "method": f"BNN Init, teacher_share {share:g}",
                "perplexity": statistics.mean(results),
                "seconds": max(seconds),
                "draws": DRAWS,
            }
        )
    ours, start = rows[-1], rows[1]
    claims = [
        claim("plain binarization of stories260K", float(str(start["perplexity"])), "perplexity", ">= 1000"),
        claim("BNN Init of stories260K", float(str(ours["perplexity"])), "perplexity", "<= 110"),
        claim("BNN Init of stories260K, slowest draw, one core", float(str(ours["seconds"])), "s", "<= 30"),
    ]
    publish("init", "make bench-init", rows, claims)


if __name__ == "__main__":
    main()
