"""Owns the packed checkpoint: writing, verifying. Refuses to leave anything half-written under its final name.

A packed checkpoint is a folder in Hugging Face form:

    model.safetensors      per binary layer X:  X.weight uint8 (O, ⌈I/8⌉) and X.weight_scale float16 (O, G);
                           every other tensor, biases too, under its own name and in the source model's dtype
    config.json            with quantization_config {"quant_method": "kbop", "format_version", "group_size", "modules"}
    tokenizer files
    manifest.json          {"files": [{"path", "size", "sha256"}], …}; written last

Scales are stored non-negative: where training made one negative, its group's signs are inverted instead.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kbop_core.bits import pack_signs
from kbop_core.convert import ConversionPlan, binary_layers
from kbop_core.errors import BadCheckpoint, BadWeights, DiskFull
from kbop_core.hf import FORMAT_VERSIONS, KbopConfig, save_metadata
from kbop_core.layers import BinaryLinear

WEIGHTS_FILE = "model.safetensors"
MANIFEST_FILE = "manifest.json"


def write_packed(
    model: nn.Module,
    plan: ConversionPlan,
    folder: Path,
    source: str,
    revision: str | None,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> dict[str, Any]:
    """Write a trained model as a packed checkpoint, complete or not at all.

    Args:
        model: with the plan's layers binary.
        plan: the conversion.
        folder: final place; an older checkpoint there is replaced.
        source, revision: where config and tokenizer come from.
        dtype: of the full-precision tensors in the file: the source model's.
        metadata: provenance, stored in the safetensors header.

    Returns:
        The manifest.

    Raises:
        DiskFull: no space; nothing is left behind.
        BadWeights: a scale is not finite in float16.
    """
    with folder_written_atomically(folder) as temporary:
        tensors = packed_tensors(model, dtype)
        header = {"format": "pt", "kbop_format_version": str(FORMAT_VERSIONS[0]), **metadata}
        write_tensors(tensors, temporary / WEIGHTS_FILE, header)
        names = tuple(e.name for e in plan.binary)
        save_metadata(source, revision, temporary, KbopConfig(group_size=plan.group_size, modules=names))
        manifest = {"format_version": FORMAT_VERSIONS[0], "files": _describe_all(temporary)}
        write_json(temporary / MANIFEST_FILE, manifest)
    return manifest


def packed_tensors(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of the packed file, on the CPU; a tied tensor once, under its first name."""
    layers = binary_layers(model)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = _storable(name, layer)
    seen: set[int] = set()
    for name, value in [*model.named_parameters(), *_persistent_buffers(model)]:
        if name in tensors or value.data_ptr() in seen or name.endswith(".weight_scale"):
            continue
        seen.add(value.data_ptr())
        tensors[name] = value.detach().to("cpu", dtype if value.is_floating_point() else None).contiguous()
    return tensors


def _persistent_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    stored = model.state_dict().keys()
    return [(name, b) for name, b in model.named_buffers() if name in stored]


@torch.no_grad()
def _storable(name: str, layer: BinaryLinear) -> tuple[Tensor, Tensor]:
    """Bits and float16 scales as stored: scales ≥ 0."""
    scale = layer.weight_scale.detach().to("cpu", torch.float32)
    half = scale.abs().to(torch.float16)
    if not bool(half.isfinite().all()):
        raise BadWeights(
            f"{name}: a scale is {float(scale.abs().max()):g}, beyond float16 (at most 65504)",
            "the model's own weights are that large, or scale_lr is too high",
        )
    if not bool((scale < 0).any()):
        return layer.weight.detach().cpu().contiguous(), half.contiguous()
    direction = torch.where(scale < 0, -1.0, 1.0).unsqueeze(-1)
    signs = layer.signs().cpu().view(*scale.shape, -1) * direction
    return pack_signs(signs.view(layer.out_features, layer.in_features)), half.contiguous()


def student_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A binary model's bits and full-precision parameters, as they are, on the CPU; tied tensors once."""
    tensors = {f"{name}.weight": layer.weight for name, layer in binary_layers(model).items()}
    tensors |= dict(model.named_parameters())
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


@torch.no_grad()
def load_student(model: nn.Module, path: Path) -> None:
    """Take back what save_student wrote, into a model with the same layers binary.

    Raises:
        BadCheckpoint: other names than the model's, or not a safetensors file.
    """
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadCheckpoint(f"{path.name} cannot be read: {error}", "delete the stage's marker and resume") from error
    own = {f"{name}.weight": layer.weight for name, layer in binary_layers(model).items()} | dict(
        model.named_parameters()
    )
    if own.keys() != stored.keys():
        raise BadCheckpoint(
            f"{path.name} holds other tensors than this model has", "delete the stage's marker and resume"
        )
    for name, tensor in own.items():
        tensor.copy_(stored[name])


def save_student(model: nn.Module, path: Path) -> None:
    """Write student_tensors, whole or not at all.

    Raises:
        DiskFull: no space.
    """
    save_tensors(student_tensors(model), path)


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose bytes depend on its content alone.

    The library orders the header's metadata by a hash that differs from process to process; equal checkpoints would get
    other digests. The sorted header is as long as theirs, so it takes its place.
    """
    save_file(dict(tensors), path, dict(metadata))
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > length:
            raise BadCheckpoint(f"{path.name}: the header of {length} bytes would grow to {len(text)}")
        file.seek(8)
        file.write(text.ljust(length))


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all: temporary name, sync, rename.

    Raises:
        DiskFull: no space; the temporary file is gone.
    """
    temporary = path.with_name(f".{path.name}.writing")
    try:
        write_tensors(tensors, temporary, metadata or {})
        sync(temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        if is_disk_full(error):
            raise DiskFull(f"no space left while writing {path.name}", "free disk space and resume") from error
        raise


def verify_packed(folder: Path) -> dict[str, Any]:
    """Check every file of a packed checkpoint against its manifest, and the tensors against the format.

    Returns:
        The manifest.

    Raises:
        BadCheckpoint: a missing or changed file, a wrong dtype, a scale that is not finite or negative.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST_FILE).read_text())
        files = [(folder / e["path"], e["size"], e["sha256"]) for e in manifest["files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadCheckpoint(
            f"{folder.name} has no readable {MANIFEST_FILE}: {error}", "write the checkpoint again"
        ) from None
    for path, size, digest in files:
        if not path.is_file() or path.stat().st_size != size or sha256(path) != digest:
            raise BadCheckpoint(f"{path.name} is missing or not what was written", "write the checkpoint again")
    _verify_tensors(folder)
    return manifest


def _verify_tensors(folder: Path) -> None:
    try:
        modules = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            for name in modules:
                bits, scale = file.get_tensor(f"{name}.weight"), file.get_tensor(f"{name}.weight_scale")
                if bits.dtype != torch.uint8 or scale.dtype != torch.float16 or bits.shape[0] != scale.shape[0]:
                    raise BadCheckpoint(f"{name}: bits must be uint8 and scales float16, with equal rows")
                if not bool(scale.isfinite().all()) or bool((scale < 0).any()):
                    raise BadCheckpoint(f"{name}: a scale is negative or not finite")
    except (OSError, KeyError, SafetensorError) as error:
        raise BadCheckpoint(
            f"{folder.name} is not a packed checkpoint: {error}", "write the checkpoint again"
        ) from error


@contextmanager
def folder_written_atomically(folder: Path) -> Iterator[Path]:
    """A new sibling folder that takes `folder`'s name when the block ends well, and vanishes when it does not.

    Files are synced before the rename. ENOSPC becomes DiskFull.
    """
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                sync(path)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        if is_disk_full(error):
            raise DiskFull(f"no space left while writing {folder.name}", "free disk space and resume") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error means that the disk, or the quota, is full."""
    text = str(error)
    return getattr(error, "errno", None) in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG} or (
        (isinstance(error, SafetensorError) and ("No space left" in text or "File too large" in text))
        or (isinstance(error, RuntimeError) and "PytorchStreamWriter failed" in text)  # torch.save, inside DeepSpeed
    )


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if is_disk_full(error):
            raise DiskFull(f"no space left while writing {path.name}", "free disk space and resume") from error
        raise


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _describe_all(folder: Path) -> list[dict[str, Any]]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return [{"path": str(p.relative_to(folder)), "size": p.stat().st_size, "sha256": sha256(p)} for p in files]


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
