"""A job spec from a file, from command line options, or from both.

Refuses to validate fields: the server (or `parse_spec`, for a local run) does, with pointers to what is
wrong.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

Json = dict[str, Any]


class SpecInputError(ValueError):
    """The options or the file cannot be made into a spec."""


@dataclass(frozen=True)
class SpecOptions:
    """What a user gave; None and empty mean not given. Each option replaces the file's value."""

    file: Path | None = None
    model: str | None = None
    data: tuple[str, ...] = ()
    eval: tuple[str, ...] = ()
    name: str | None = None
    effort: str | None = None
    tokens: int | None = None
    gpus: int | None = None
    group_size: int | None = None
    seed: int | None = None
    settings: tuple[str, ...] = ()

    def build(self) -> Json:
        """The spec as JSON values, with relative paths made absolute.

        Raises:
            SpecInputError: No model or data, an unreadable file, or a `--set` that is not KEY=VALUE.
        """
        spec = {} if self.file is None else _read(self.file)
        base = Path.cwd() if self.file is None or str(self.file) == "-" else self.file.resolve().parent
        spec = _with_absolute_paths(spec, base)
        chosen = {
            "model": None if self.model is None else absolute_source(self.model, Path.cwd()),
            "data": [{"source": absolute_source(d, Path.cwd())} for d in self.data] or None,
            "eval": [{"source": absolute_source(d, Path.cwd())} for d in self.eval] or None,
            "name": self.name,
            "method.effort": self.effort,
            "method.tokens": self.tokens,
            "resources.gpus": self.gpus,
            "group_size": self.group_size,
            "seed": self.seed,
        }
        for key, value in chosen.items():
            if value is not None:
                _put(spec, key, value)
        for setting in self.settings:
            _put(spec, *_parse_setting(setting))
        missing = [option for option in ("model", "data") if option not in spec]
        if missing:
            wanted = " and ".join(f"--{option}" for option in missing)
            raise SpecInputError(
                f"a job needs a spec file or {wanted}; for a first try: --model builtin:demo --data builtin:python-docs"
            )
        return spec


def absolute_source(source: str, base: Path) -> str:
    """A source as the server can read it: `./x`, `../x` and `~/x` mean a place here and become absolute."""
    if source.startswith("~"):
        return str(Path(source).expanduser())
    if source in (".", "..") or source.startswith(("./", "../")):
        return str((base / source).resolve())
    return source


def _read(path: Path) -> Json:
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
        value = json.loads(text, parse_constant=_no_constant)
    except OSError as error:
        raise SpecInputError(f"the spec file {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise SpecInputError(f"the spec file {path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise SpecInputError(f"the spec file {path} holds a {type(value).__name__}, not an object")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _with_absolute_paths(spec: Json, base: Path) -> Json:
    """Only touches values of the right form; anything else is left for the validation to complain about."""
    if isinstance(spec.get("model"), str):
        spec["model"] = absolute_source(spec["model"], base)
    for field in ("data", "eval"):
        for item in spec[field] if isinstance(spec.get(field), list) else ():
            if isinstance(item, dict) and isinstance(item.get("source"), str):
                item["source"] = absolute_source(item["source"], base)
    return spec


def _parse_setting(setting: str) -> tuple[str, Any]:
    key, equals, text = setting.partition("=")
    if not equals or not all(key.split(".")):
        raise SpecInputError(f"--set {setting!r} is not KEY=VALUE, such as --set method.flip_rate=0.002")
    try:
        return key, json.loads(text, parse_constant=_no_constant)
    except ValueError:
        return key, text


def _put(spec: Json, dotted: str, value: Any) -> None:
    *parents, name = dotted.split(".")
    place = spec
    for parent in parents:
        child = place.setdefault(parent, {})
        if not isinstance(child, dict):
            raise SpecInputError(f"{dotted} cannot be set: {parent} is {child!r}, not an object")
        place = child
    place[name] = value
