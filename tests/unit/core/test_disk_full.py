"""A file system that really refuses more bytes: the limit of file sizes, set in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KINDS = ["tensors", "json", "folder"]

#: Writes each kind into argv[1]/kind under a limit of 64 KiB a file; prints which error each raised.
SCRIPT = """
import json, resource, sys
from pathlib import Path

import torch

from kbop_core import checkpoint, errors

def folder(final):
    with checkpoint.folder_written_atomically(final) as temporary:
        (temporary / "small").write_text("fits")
        checkpoint.save_file({"x": torch.zeros(1 << 20)}, temporary / "large")

writers = {
    "tensors": lambda final: checkpoint.save_tensors({"x": torch.zeros(1 << 20)}, final),
    "json": lambda final: checkpoint.write_json(final, ["x"] * 100_000),
    "folder": folder,
}
resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, resource.RLIM_INFINITY))
outcomes = {}
for kind, write in writers.items():
    Path(sys.argv[1], kind).mkdir()
    try:
        write(Path(sys.argv[1], kind, "final"))
    except errors.KbopError as error:
        outcomes[kind] = [type(error).__name__, str(error)]
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[str]], Path]:
    """(kind → error and message, folder with a folder for each kind)."""
    folder = tmp_path_factory.mktemp("small-disk")
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1]), folder


@pytest.mark.parametrize("kind", KINDS)
def test_running_out_of_space_is_disk_full_and_names_the_file(
    kind: str, small_disk: tuple[dict[str, list[str]], Path]
) -> None:
    assert small_disk[0][kind] == ["DiskFull", "no space left while writing final"]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_under_the_final_name_nor_any_other(
    kind: str, small_disk: tuple[dict[str, list[str]], Path]
) -> None:
    assert list((small_disk[1] / kind).iterdir()) == []
