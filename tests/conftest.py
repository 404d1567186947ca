"""What every kind of test may ask for: the folder of real models and texts, where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

#: Beside the project's own folder; nothing in the project needs it.
BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """KBOP_SHARED_DATA, or ../shared/data; the test is skipped where neither is there."""
    folder = Path(os.environ.get("KBOP_SHARED_DATA") or BESIDE)
    if not (folder / "models").is_dir() or not (folder / "text").is_dir():
        pytest.skip(f"needs real models and texts: set KBOP_SHARED_DATA, or put them at {BESIDE}")
    return folder.resolve()
