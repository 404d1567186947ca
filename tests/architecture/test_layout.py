"""How the source is laid out: packaging, file sizes, docstrings, functions a reader can hold in mind."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRODUCT = ("kbop_core", "jobs", "service")
EVERYTHING = [*PRODUCT, "benchmarks", "tests"]


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_every_package_on_disk_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    on_disk = {named(path.parent).replace("/", ".") for path in files(*PRODUCT)}
    assert sorted(listed) == sorted(on_disk)


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {path.parent for path in files(*PRODUCT)}
    assert [named(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_no_folder_of_tests_shadows_a_package() -> None:
    assert [named(path) for path in (ROOT / "tests").rglob("__init__.py")] == []


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {named(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files(*EVERYTHING)}
    assert len(lengths) > 100
    assert {name: n for name, n in lengths.items() if n > 400} == {}


def test_every_module_says_what_it_is() -> None:
    trees = {named(path): ast.parse(path.read_text(encoding="utf-8")) for path in files(*EVERYTHING)}
    assert [name for name, tree in trees.items() if not ast.get_docstring(tree)] == []


def test_no_function_of_the_product_is_longer_than_60_lines() -> None:
    found = {f"{named(p)}:{f.name}": (f.end_lineno or 0) - f.lineno + 1 for p in files(*PRODUCT) for f in functions(p)}
    assert {name: n for name, n in found.items() if n > 60} == {}


def test_nothing_is_called_utils_helpers_or_common() -> None:
    assert [named(p) for p in files(*EVERYTHING) if p.stem in {"utils", "helpers", "common", "misc"}] == []


@pytest.mark.parametrize("call", ["print", "input", "exec", "eval"])
def test_the_core_never_calls(call: str) -> None:
    found = [
        f"{named(path)}:{node.lineno}"
        for path in files("kbop_core")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == call
    ]
    assert found == []


@pytest.mark.parametrize("library", ["time", "datetime", "random"])
def test_the_core_reads_no_clock_and_no_global_dice(library: str) -> None:
    found = [
        named(path)
        for path in files("kbop_core")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import) and any(alias.name == library for alias in node.names)
    ]
    assert found == []
