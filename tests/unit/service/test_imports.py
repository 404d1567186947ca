"""What the server and the command load, and how fast the command starts."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "deepspeed", "kbop_core", "numpy")


def loaded(code: str, names: tuple[str, ...]) -> str:
    """Which of `names` are in sys.modules after `code` ran in a fresh interpreter."""
    script = f"{code}\nimport sys\nprint([n for n in {names!r} if n in sys.modules])"
    return subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(
    "module",
    ["service.app", "service.cli", "service.serve", "service.binarize", "service.client", "service.display"],
)
def test_no_part_of_the_service_loads_torch_or_the_core(module: str) -> None:
    assert loaded(f"import {module}", HEAVY) == "[]"


def test_the_command_loads_neither_server_nor_database_before_it_needs_them() -> None:
    assert loaded("import service.cli", ("fastapi", "uvicorn", "sqlalchemy", "alembic", "httpx", "rich.table")) == "[]"


def test_the_client_needs_no_server_libraries() -> None:
    assert loaded("import service.client", ("fastapi", "starlette", "sse_starlette", "sqlalchemy")) == "[]"
