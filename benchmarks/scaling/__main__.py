"""`make bench-scaling`: what the sharded state holds, sends and costs, beside latent weights under ZeRO stage 2.

Each case runs in ranks of its own, one thread each, on this machine; state is counted from live tensors, traffic from
the arguments of the collectives (benchmarks/scaling/counters.py), and ratios of times are taken within this run. With
a CUDA GPU the 1 B and 8 B shapes run as well. About ten minutes on two cores.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.record import Claim, claim, fill, markdown, publish
from benchmarks.scaling.cases import Case
from benchmarks.scaling.loading import compare
from benchmarks.scaling.reductions import two_ways
from jobs.process import free_port
from kbop_core.evidence import EvidenceKind
from kbop_core.layers import BinaryLinear

COMMAND = "make bench-scaling"
DOCUMENT, README = (Path(__file__).parents[2] / name for name in ("docs/scaling.md", "README.md"))
#: Evidence, number of ranks and shape whose state, traffic and peak are counted.
STATES: tuple[tuple[EvidenceKind, int, str], ...] = (
    ("bfloat16", 1, "13 M"),
    ("bfloat16", 2, "13 M"),
    ("bfloat16", 4, "13 M"),
    ("int8", 1, "13 M"),
    ("int8", 2, "13 M"),
    ("int8", 4, "13 M"),
    ("bfloat16", 2, "51 M, wide"),
)
#: Repeats of the timed cases; one and two ranks take turns.
TURNS = 3
TIMED = Case("13 M", "kbop", context=256, windows=8, steps=4)
SMALL = Case("1 M", "kbop", context=64, windows=4, steps=1)


def run(case: Case, size: int, device: str = "cpu") -> list[dict[str, Any]]:
    """What each rank of a case found."""
    with tempfile.TemporaryDirectory() as folder:
        place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        base = os.environ | place | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": device, "SCALING_DEVICE": device}
        command = [sys.executable, "-m", "benchmarks.scaling.cases", json.dumps(asdict(case))]
        files = [Path(folder) / f"{rank}.json" for rank in range(size)]
        ranks = [
            subprocess.Popen(
                [*command, str(file)],
                env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            for rank, file in enumerate(files)
        ]
        for rank in ranks:
            _, words = rank.communicate()
            if rank.returncode:
                raise RuntimeError(f"a rank of {case} failed:\n{words.decode(errors='replace')[-3000:]}")
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def per_weight(found: dict[str, Any]) -> dict[str, float]:
    return {kind: held / found["weights"] for kind, held in found["state_bytes"].items()}


def state(rows: list[dict[str, Any]], claims: list[Claim]) -> None:
    """Bytes between two steps, and bytes sent, for 1, 2 and 4 ranks."""
    for evidence, size, shape in STATES:
        ranks = run(replace(TIMED, shape=shape, windows=4, steps=1, evidence=evidence), size)
        held = max((per_weight(found) for found in ranks), key=lambda kinds: sum(kinds.values()))
        whole, bar = sum(held.values()), f"<= {1 / 8 + (2 if evidence == 'bfloat16' else 1.0625) / size:.6g}"
        sent = ranks[0]["wire_signs"] / ranks[0]["weights"]
        extra = max(found["extra_bytes"] / found["largest_gradient"] for found in ranks)
        rows.append(row(f"KBOP, {shape}", size, evidence=evidence, state=whole, wire=sent, extra_gradients=extra))
        label = f"{evidence}, {size} rank{'s' * (size > 1)}, {shape}"
        claims.append(claim(f"bits and evidence, {label}", held["bits"] + held["evidence"], "bytes/weight", bar))
        claims.append(claim(f"with moments, {label}", whole, "bytes/weight", bar))
        claims.append(claim(f"step's peak over plain backward, {label}", extra, "largest gradients", "<= 1"))
        if size > 1 and evidence == "bfloat16":
            claims.append(claim(f"given to collectives, {label}", sent, "bytes/weight", "<= 2.125"))
            part = sent * (size - 1) / size
            claims.append(claim(f"sent by a rank, {label}", part, "bytes/weight", "<= 2.125"))
    for size in (2, 4):
        found = run(replace(TIMED, context=32, windows=4, steps=1, method="latent", bf16=True), size)[0]
        sent = found["wire_signs"] / found["weights"]
        rows.append(row("latent, ZeRO 2", size, state=sum(per_weight(found).values()), wire=sent))
        claims.append(claim(f"latent weights give to collectives, {size} ranks", sent, "bytes/weight", ">= 4"))


def speed(rows: list[dict[str, Any]], claims: list[Claim]) -> None:
    """Time of a step on one and two ranks, of its flips, and of a checkpoint."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    shares: dict[int, list[float]] = {1: [], 2: []}
    last: dict[int, dict[str, Any]] = {}
    latent: list[float] = []
    for turn in range(TURNS):
        for size in (1, 2):
            last[size] = run(replace(TIMED, checkpoints=turn == TURNS - 1), size)[0]
            seconds[size].append(last[size]["step_s"])
            shares[size].append(last[size]["flip_s"] / last[size]["step_s"])
        latent.append(run(replace(TIMED, method="latent"), 2)[0]["step_s"])
    median = {size: statistics.median(values) for size, values in seconds.items()}
    for size in (1, 2):
        rows.append(row("KBOP", size, step_s=median[size], flips_share=statistics.median(shares[size])))
        rows[-1] |= {f"{name}_s": value for name, value in last[size]["phases"].items()}
    rows.append(row("latent, ZeRO 2", 2, step_s=statistics.median(latent)))
    for size in (1, 2):
        share = statistics.median(shares[size])
        claims.append(
            claim(f"flips and bits' all-gather, {size} rank{'s' * (size > 1)}", share, "share of the step", "<= 0.05")
        )
    claims.append(claim("strong scaling, 2 ranks", median[1] / (2 * median[2]), "efficiency", ">= 0.8"))
    claims.append(claim("KBOP step / latent step, 2 ranks", median[2] / statistics.median(latent), "ratio", "<= 1.1"))
    stall = last[2]["checkpoint_copy_s"] / last[2]["checkpoint_whole_s"]
    claims.append(claim("a checkpoint stops training, of its whole time", stall, "share", "<= 0.5"))


def row(method: str, ranks: int, **values: Any) -> dict[str, Any]:
    """A row with every column."""
    columns = ("evidence", "state", "wire", "extra_gradients", "step_s", "flips_share")
    return {"method": method, "ranks": ranks} | {name: values.get(name, "") for name in columns}


def loading(rows: list[dict[str, Any]], claims: list[Claim]) -> None:
    """Host memory that it takes to make a model on disk binary."""
    found = compare()
    for way in ("whole", "blocks"):
        rows.append(row(f"loading and converting, {way}", 1))
        rows[-1]["peak_of_model"] = found[way] / found["size"]
    share = found["blocks"] / found["size"]
    claims.append(claim("converting block by block, peak host memory", share, "of the model's bytes", "<= 1"))


def reductions(rows: list[dict[str, Any]]) -> None:
    """The two ways to give gradients to their owners."""
    for name, seconds in two_ways().items():
        rows.append(row(name, 2, step_s=seconds))


def unpacking(rows: list[dict[str, Any]], claims: list[Claim]) -> None:
    """What rebuilding a weight from its bits costs beside the product it is for: what keeping it dense would save."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layer = BinaryLinear(2048, 2048, False, 128, trainable=True, device=device)
    for tokens in (512, 2048):
        x = torch.randn(tokens, 2048, device=device, dtype=dtype)
        dense = layer.dense(dtype)
        product = _seconds(partial(F.linear, x, dense))
        rebuilt = _seconds(partial(layer.dense, dtype))
        rows.append(row(f"weight rebuilt for {tokens} tokens", 1, step_s=rebuilt))
        rows.append(row(f"product of {tokens} tokens", 1, step_s=product))
        if tokens == 2048:
            claims.append(claim("rebuilding a weight / its product, 2048 tokens", rebuilt / product, "ratio", "<= 0.1"))


def _seconds(work: Callable[[], Any]) -> float:
    """Median of ten."""
    found = []
    for _ in range(12):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found[2:])


def gpu(rows: list[dict[str, Any]], claims: list[Claim]) -> None:
    """1 B and 8 B shapes with their teacher on one GPU; latent weights beside them, which may not fit."""
    gib = 2.0**30
    for shape, limit in (("1 B", 24), ("8 B", 80)):
        case = Case(shape, "kbop", context=2048, windows=4, steps=5, bf16=True, recompute=True)
        for method in ("kbop", "latent"):
            found = run(replace(case, method=method), 1, "cuda")[0]
            name = f"{'KBOP' if method == 'kbop' else 'latent, ZeRO 2'}, {shape}"
            rows.append(row(name, 1))
            rows[-1] |= {key: found.get(key, "") for key in ("tokens_per_s", "mfu", "peak_bytes", "out_of_memory")}
            if method == "kbop":
                peak = found["peak_bytes"] / gib if "peak_bytes" in found else float("inf")
                claims.append(claim(f"peak GPU memory, {shape} with its teacher", peak, "GiB", f"<= {limit}"))
                if shape == "1 B":
                    share = found["flip_s"] / found["step_s"]
                    claims.append(claim("flips, GPU, 1 B weights", share, "share of the step", "<= 0.05"))


def main() -> None:
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    claims: list[Claim] = []
    reductions(rows)
    unpacking(rows, claims)
    loading(rows, claims)
    speed(rows, claims)
    state(rows, claims)
    if torch.cuda.is_available():
        gpu(rows, claims)
    columns = {name: "" for one in rows for name in one}
    full = [columns | one for one in rows]
    publish("scaling", COMMAND, full, claims)
    fill(DOCUMENT, {"claims": markdown([asdict(c) for c in claims]), "rows": markdown(full)}, COMMAND)
    fill(README, {"scaling": markdown(list(beside_the_peer(rows)))}, COMMAND)


def beside_the_peer(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Held, sent and taken by KBOP and by latent weights, for the numbers of ranks that both ran on."""
    columns = {"state": "state, bytes a weight and rank", "wire": "given to collectives, bytes a weight", "step_s": "s"}
    for ranks in (2, 4):
        for name in ("KBOP", "latent, ZeRO 2"):
            ours = [r for r in rows if r["ranks"] == ranks and r["method"] in (name, f"{name}, 13 M")]
            found = {column: next((r[column] for r in ours if r[column] != ""), None) for column in columns}
            yield {"ranks": ranks, "method": name} | {words: found[column] for column, words in columns.items()}


if __name__ == "__main__":
    main()
