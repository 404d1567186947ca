"""What a CUDA GPU does beside a CPU: the same flips, a step in bfloat16 with its phases. Skipped without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.process import free_port
from kbop_core.evidence import EvidenceKind
from kbop_core.kbop import KBOP
from kbop_core.layers import BinaryLinear
from kbop_core.schedules import FlipSchedule
from kbop_core.selection import kth_largest
from kbop_core.shard import Gang

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")
STEPS = 5


def flipped(device: str, evidence: EvidenceKind) -> list[torch.Tensor]:
    """Bits after each step of whole-number gradients, which sum exactly on any device."""
    layer = BinaryLinear(129, 40, False, 8, trainable=True)
    layer.set_signs(torch.randn(40, 129, generator=torch.Generator().manual_seed(0)))
    layer = layer.to(device)
    kbop, bits = KBOP({"a": layer}, FlipSchedule(0.1, STEPS, 1), momentum=0.5, evidence=evidence), []
    stream = torch.randint(-3, 4, (STEPS, 40, 129), generator=torch.Generator().manual_seed(1)).float()
    for gradient in stream:
        assert layer.gradient_sink is not None
        layer.gradient_sink(gradient.to(device))
        assert kbop.step().flips["a"] > 0
        bits.append(layer.weight.cpu().clone())
    return bits


@pytest.mark.parametrize("evidence", ["bfloat16", "int8"])
def test_a_gpu_flips_the_signs_that_a_cpu_flips(evidence: EvidenceKind) -> None:
    pairs = zip(flipped("cuda", evidence), flipped("cpu", evidence), strict=True)
    assert all(torch.equal(gpu, cpu) for gpu, cpu in pairs)


def test_thresholds_are_the_same_on_a_gpu() -> None:
    values = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (1, 1000, 70_000)]
    ranks = [1, 17, 300]
    assert kth_largest([v.cuda() for v in values], ranks, Gang()) == kth_largest(values, ranks, Gang())


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A rank that trains the 13 M shape in bfloat16 with recomputed blocks, through NCCL and DeepSpeed."""
    out = tmp_path_factory.mktemp("gpu") / "found.json"
    case = {
        "shape": "13 M",
        "method": "kbop",
        "context": 256,
        "windows": 8,
        "steps": 3,
        "bf16": True,
        "recompute": True,
    }
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    env = os.environ | place | {"MASTER_PORT": str(free_port()), "SCALING_DEVICE": "cuda", "DS_ACCELERATOR": "cuda"}
    subprocess.run([sys.executable, "-m", "benchmarks.scaling.cases", json.dumps(case), str(out)], env=env, check=True)
    found: dict[str, Any] = json.loads(Path(out).read_text(encoding="utf-8"))
    return found


def test_a_step_in_bfloat16_ends_and_tells_its_phases(step: dict[str, Any]) -> None:
    assert step["tokens_per_s"] > 0
    assert all(step["phases"][name] > 0 for name in ("forward", "backward", "flips", "optimizer"))


def test_the_state_on_a_gpu_is_what_it_is_on_a_cpu(step: dict[str, Any]) -> None:
    weights = step["weights"]
    assert step["state_bytes"]["bits"] == weights / 8
    assert step["state_bytes"]["evidence"] == 2 * weights
