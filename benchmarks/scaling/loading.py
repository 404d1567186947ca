"""Owns how much host memory it takes to make a model on disk binary: whole, and block by block.

python -m benchmarks.scaling.loading FOLDER whole|blocks
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.scaling.cases import Shape
from kbop_core.convert import convert_plain, plan_conversion
from kbop_core.hf import load_lazily, load_model

#: 86 M parameters, 172 MB in bfloat16, of which a block is a sixteenth.
SHAPE = Shape(640, 1792, 16, 10, 10)
#: Bytes from which glibc gives freed memory back at once: otherwise what it keeps is counted too.
RETURN_FROM = "65536"
#: Loaded first, so that what libraries take on first use is not counted.
TINY = Shape(64, 128, 1, 1, 1)


def compare() -> dict[str, Any]:
    """Peak resident bytes beyond those after a tiny model, by way of loading, and the model's bytes on disk."""
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in {"tiny": TINY, "model": SHAPE}.items():
            shape.model(64, torch.device("cpu"), torch.bfloat16).save_pretrained(Path(folder) / name)
        size = sum(path.stat().st_size for path in (Path(folder) / "model").glob("*.safetensors"))
        found = {way: _in_a_new_process(folder, way) for way in ("whole", "blocks")}
    return found | {"size": size}


def _in_a_new_process(folder: str, way: str) -> int:
    command = [sys.executable, "-m", "benchmarks.scaling.loading", folder, way]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": RETURN_FROM, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return int(json.loads(done.stdout.splitlines()[-1]))


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


def convert(folder: str, way: str) -> object:
    """A binary model."""
    if way == "blocks":
        model = load_lazily(folder, None, torch.bfloat16, torch.device("cpu"))
    else:
        model = load_model(folder, dtype=torch.bfloat16)
    return convert_plain(model, plan_conversion(model, 128), trainable=True)


def main(folder: str, way: str) -> None:
    torch.set_num_threads(1)
    convert(f"{folder}/tiny", way)
    before = resident("VmRSS")
    held = convert(f"{folder}/model", way)
    print(json.dumps(resident("VmHWM") - before))
    del held


if __name__ == "__main__":
    main(*sys.argv[1:])
