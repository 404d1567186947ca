"""A file system that really refuses more bytes: the limit of file sizes, set in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

#: Writes what argv[1] names into argv[2] under a limit of 64 KiB a file; prints the error's type.
SCRIPT = """
import resource, sys
from pathlib import Path

import torch

from kbop_core import checkpoint, errors

resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, resource.RLIM_INFINITY))
kind, folder = sys.argv[1], Path(sys.argv[2])
try:
    if kind == "tensors":
        checkpoint.save_tensors({"x": torch.zeros(1 << 20)}, folder / "final")
    elif kind == "json":
        checkpoint.write_json(folder / "final", ["x"] * 100_000)
    else:
        with checkpoint.folder_written_atomically(folder / "final") as temporary:
            (temporary / "small").write_text("fits")
            checkpoint.save_file({"x": torch.zeros(1 << 20)}, temporary / "large")
except errors.KbopError as error:
    print(type(error).__name__, "final" in str(error))
"""


@pytest.fixture(scope="module", params=["tensors", "json", "folder"])
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(what was printed, the folder written into)."""
    folder = tmp_path_factory.mktemp("small-disk")
    command = [sys.executable, "-c", SCRIPT, request.param, str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"DS_ACCELERATOR": "cpu"}
    )
    return done.stdout.strip(), folder


def test_running_out_of_space_is_disk_full_by_name(outcome: tuple[str, Path]) -> None:
    assert outcome[0] == "DiskFull True"


def test_nothing_is_left_under_the_final_name_nor_any_other(outcome: tuple[str, Path]) -> None:
    assert list(outcome[1].iterdir()) == []
