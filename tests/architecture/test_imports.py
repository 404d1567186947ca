"""Who may import whom: the contracts, one importer for each heavy library, a server without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRODUCT = ("kbop_core", "jobs", "service")
HEAVY = {"torch", "transformers", "deepspeed", "kbop_core"}


def sources(*packages: str) -> list[Path]:
    found = [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    assert found
    return found


def imported(path: Path) -> Iterator[str]:
    """Top-level names of everything a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def importers(library: str, *packages: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in sources(*packages) if library in imported(path)}


def test_the_import_contracts_are_kept() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    "module",
    [
        "service.app",
        "service.cli",
        "jobs.node_agent",
        "jobs.runner",
        "jobs.scheduler",
        "jobs.store",
        "jobs.executors.local",
        "jobs.spec",
        "jobs.plan",
    ],
)
def test_server_and_runner_load_nothing_heavy(module: str) -> None:
    script = f"import sys, {module}\nprint(sorted({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_core_imports_nothing_of_the_service_around_it() -> None:
    around = {
        "jobs",
        "service",
        "fastapi",
        "uvicorn",
        "sqlalchemy",
        "alembic",
        "pydantic",
        "typer",
        "httpx",
        "structlog",
    }
    assert {(str(p), name) for p in sources("kbop_core") for name in imported(p) if name in around} == set()


def test_only_the_engine_imports_deepspeed() -> None:
    assert importers("deepspeed", *PRODUCT) == {"kbop_core/engine.py"}


def test_only_one_module_of_the_core_imports_transformers() -> None:
    assert importers("transformers", "kbop_core") == {"kbop_core/hf.py"}


def test_only_the_scripts_of_the_demo_bypass_the_cores_contact_with_transformers() -> None:
    assert {Path(path).parent.as_posix() for path in importers("transformers", "jobs", "service")} <= {"jobs/demo"}


@pytest.mark.parametrize("library", ["torch", "numpy", "safetensors", "transformers", "kbop_core"])
def test_the_service_imports_no_numeric_library(library: str) -> None:
    assert importers(library, "service") == set()


@pytest.mark.parametrize("library", ["fastapi", "starlette", "uvicorn"])
def test_only_the_service_knows_http_servers(library: str) -> None:
    assert importers(library, "kbop_core", "jobs") == set()
