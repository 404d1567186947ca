"""Stage `pack`: the trained student becomes a packed checkpoint on disk, complete or not at all. Measures nothing."""

from __future__ import annotations

from typing import Any

from jobs.workspace import Workspace
from kbop_core.checkpoint import load_student, verify_packed, write_packed
from kbop_core.convert import convert_plain
from kbop_core.hf import source_dtype


def pack(space: Workspace) -> dict[str, Any]:
    """Write and verify `work/packed`; rank 0 alone works."""
    if not space.leads:
        return {}
    student = space.fresh_model().float()
    convert_plain(student, space.plan, trainable=True)
    load_student(student, space.final_student)
    source = space.model_source
    dtype = source_dtype(student, source.location, source.revision)
    provenance = {
        "base_model": space.spec.model,
        "spec_sha256": space.spec.digest(),
        "training_text_sha256": space.facts("prepare")["training_text_sha256"],
    }
    folder = space.work / "packed"
    write_packed(student, space.plan, folder, source.location, source.revision, dtype, provenance)
    manifest = verify_packed(folder)
    return {"bytes": sum(f["size"] for f in manifest["files"]), "source_dtype": str(dtype).removeprefix("torch.")}
