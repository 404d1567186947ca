"""Where a model or a text comes from, and whether this server may read it.

Refuses to load anything: it looks at names, paths, configs and headers; no pickle, no code, no network.

A source is `builtin:NAME`, a path (it starts with `/`, `./`, `../` or `~`) or a hub id
`owner/name[@revision]`. The server calls `resolve_*` with its policy when a job is submitted; the ranks call
`locate_*`, which only find.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jobs.errors import (
    BadDataType,
    BadWeights,
    EmptyData,
    OwnerNotAllowed,
    PathNotAllowed,
    PickleWeights,
    RemoteCode,
    UnknownData,
    UnknownModel,
)
from jobs.json_files import read_json
from jobs.safetensors_header import check_safetensors

DATA_TYPES = (".txt", ".jsonl", ".parquet")
_PATH_STARTS = ("/", "./", "../", "~")
_HUB_ID = re.compile(
    r"(?P<owner>[A-Za-z0-9][\w.-]{0,95})/(?P<name>[A-Za-z0-9][\w.-]{0,95})(@(?P<revision>[\w./-]{1,128}))?"
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_BUILTIN_MODELS = {"demo": Path(__file__).parent / "demo" / "teacher"}
_BUILTIN_DATA = ("python-docs",)


@dataclass(frozen=True)
class SourcePolicy:
    """What this server may read: folders for models and data, and hub owners (`*`: any). Empty: none."""

    model_roots: tuple[Path, ...] = ()
    data_roots: tuple[Path, ...] = ()
    hub_owners: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelSource:
    """A model: `location` is an absolute folder (builtin, path) or a hub id without its revision."""

    kind: Literal["builtin", "path", "hub"]
    location: str
    revision: str | None = None


@dataclass(frozen=True)
class DataSourceRef:
    """A text: `location` is a builtin's name, an absolute file, or a hub id without its revision."""

    kind: Literal["builtin", "file", "hub"]
    location: str
    revision: str | None = None


def locate_model(name: str) -> ModelSource:
    """What `name` means, without asking whether it may be used. Raises UnknownModel."""
    if name.startswith("builtin:"):
        folder = _BUILTIN_MODELS.get(name.removeprefix("builtin:"))
        if folder is None:
            raise UnknownModel(f"there is no built-in model {name!r}", f"built in: {_builtins(_BUILTIN_MODELS)}")
        return ModelSource("builtin", str(folder))
    if name.startswith(_PATH_STARTS):
        return ModelSource("path", str(Path(name).expanduser().resolve()))
    match = _HUB_ID.fullmatch(name)
    if match is None:
        raise UnknownModel(f"{name!r} is not a model", _FORMS)
    return ModelSource("hub", f"{match['owner']}/{match['name']}", match["revision"])


def locate_data(name: str) -> DataSourceRef:
    """What `name` means, without asking whether it may be used. Raises UnknownData."""
    if name.startswith("builtin:"):
        builtin = name.removeprefix("builtin:")
        if builtin not in _BUILTIN_DATA:
            raise UnknownData(f"there is no built-in text {name!r}", f"built in: {_builtins(_BUILTIN_DATA)}")
        return DataSourceRef("builtin", builtin)
    if name.startswith(_PATH_STARTS):
        return DataSourceRef("file", str(Path(name).expanduser().resolve()))
    match = _HUB_ID.fullmatch(name)
    if match is None:
        raise UnknownData(f"{name!r} is not a text", _FORMS)
    return DataSourceRef("hub", f"{match['owner']}/{match['name']}", match["revision"])


_FORMS = "use builtin:NAME, an absolute path, or a hub id owner/name[@revision]"


def resolve_model(name: str, policy: SourcePolicy) -> ModelSource:
    """The model, after checking that this server may read it and that it can be one.

    Raises:
        UnknownModel, PathNotAllowed, OwnerNotAllowed, PickleWeights, RemoteCode, BadWeights.
    """
    source = locate_model(name)
    if source.kind == "hub":
        _check_owner(source.location, policy)
        return source
    folder = Path(source.location)
    roots: tuple[Path, ...] = (folder,)
    if source.kind == "path":
        roots = policy.model_roots
        _check_root(name, folder, roots, "model_roots")
    if not folder.is_dir():
        raise UnknownModel(f"there is no model folder {name!r}", "a model is a folder in Hugging Face form")
    _check_config(name, folder)
    _check_weights(name, folder, roots)
    return source


def resolve_data(name: str, policy: SourcePolicy) -> DataSourceRef:
    """The text, after checking that this server may read it and that it holds something.

    Raises:
        UnknownData, PathNotAllowed, OwnerNotAllowed, BadDataType, EmptyData.
    """
    source = locate_data(name)
    if source.kind == "hub":
        _check_owner(source.location, policy)
    if source.kind == "file":
        file = Path(source.location)
        _check_root(name, file, policy.data_roots, "data_roots")
        if not file.is_file():
            raise UnknownData(f"there is no data file {name!r}", "give the path of a file on the server")
        if file.suffix not in DATA_TYPES:
            raise BadDataType(f"{name!r} has type {file.suffix or 'none'!r}", f"use one of {', '.join(DATA_TYPES)}")
        if file.stat().st_size == 0:
            raise EmptyData(f"{name!r} is empty", "give a file with text in it")
    return source


def _check_owner(hub_id: str, policy: SourcePolicy) -> None:
    owner = hub_id.split("/")[0]
    if "*" not in policy.hub_owners and owner not in policy.hub_owners:
        allowed = ", ".join(policy.hub_owners) or "none"
        raise OwnerNotAllowed(
            f"hub owner {owner!r} is not allowed here", f"allowed owners: {allowed} (KBOP_HUB_OWNERS)"
        )


def _check_root(name: str, resolved: Path, roots: tuple[Path, ...], setting: str) -> None:
    if not name.startswith(("/", "~")):
        raise PathNotAllowed(
            f"{name!r} is a relative path, and a server has no folder to start from", "make it absolute"
        )
    if not _inside(resolved, roots):
        allowed = ", ".join(str(root) for root in roots) or "none"
        raise PathNotAllowed(f"{name!r} is not under an allowed folder", f"allowed: {allowed} (KBOP_{setting.upper()})")


def _inside(resolved: Path, roots: tuple[Path, ...]) -> bool:
    return any(resolved.is_relative_to(root.expanduser().resolve()) for root in roots)


def _check_config(name: str, folder: Path) -> None:
    config = read_json(folder / "config.json")
    if config is None:
        raise UnknownModel(f"{name!r} has no readable config.json", "a model is a folder in Hugging Face form")
    for file in ("config.json", "tokenizer_config.json"):
        if "auto_map" in (read_json(folder / file) or {}):
            raise RemoteCode(
                f"{file} of {name!r} has auto_map: it wants code of its own to run", "use a model without it"
            )


def _check_weights(name: str, folder: Path, roots: tuple[Path, ...]) -> None:
    files = sorted(folder.glob("*.safetensors"))
    if not files and any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        raise PickleWeights(f"{name!r} has its weights only as pickle files", "convert them to safetensors")
    if not files:
        raise BadWeights(f"{name!r} has no .safetensors file", "a model is a folder in Hugging Face form")
    index = folder / "model.safetensors.index.json"
    missing = _indexed(name, index) - {file.name for file in files} if index.exists() else set[str]()
    if missing:
        raise BadWeights(f"{name!r} lacks weight files its index names: {', '.join(sorted(missing))}", "copy them too")
    for file in files:
        if not _inside(file.resolve(), roots):
            raise PathNotAllowed(
                f"{file.name} of {name!r} is a link out of the allowed folders", "copy the file instead"
            )
        check_safetensors(file)


def _indexed(name: str, index: Path) -> set[str]:
    weight_map = (read_json(index) or {}).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise BadWeights(f"{index.name} of {name!r} has no weight_map", "copy the model again")
    return set(weight_map.values())


def _builtins(names: dict[str, Path] | tuple[str, ...]) -> str:
    return ", ".join(f"builtin:{name}" for name in names)
