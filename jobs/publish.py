"""The last stage: a finished checkpoint folder and its report become artifacts.

Refuses to publish anything whose bytes are not those its manifest announces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from jobs.artifacts import ArtifactStore
from jobs.errors import BadManifest
from jobs.json_files import read_json
from jobs.layout import packed_dir, report_dir
from jobs.records import ArtifactRecord

_REPORT_FILES = ("report.json", "report.html")


def publish(
    store: ArtifactStore, job_id: str, job_dir: Path, between_files: Callable[[], None]
) -> list[ArtifactRecord]:
    """Store every file of the packed checkpoint, its manifest and the report.

    Args:
        store: Where the bytes go; files stored by an earlier try are found to be there already.
        job_id: Whose artifacts they are.
        job_dir: The job's folder.
        between_files: Called before each file; raises to give up.

    Returns:
        Records with paths as users see them: those of the manifest, `manifest.json`, `report/report.*`.

    Raises:
        BadManifest, HashMismatch, DiskFull: Nothing of the job may be recorded then.
    """
    records = []
    for path, source, sha256 in _files(job_dir):
        between_files()
        if not source.is_file():
            raise BadManifest(f"{path!r} is to be published, but {source} is not there")
        blob = store.put(source, sha256)
        records.append(ArtifactRecord(job_id, path, blob.size, blob.sha256))
    return records


def _files(job_dir: Path) -> Iterator[tuple[str, Path, str | None]]:
    """Public path, file and announced hash of everything to publish."""
    packed = packed_dir(job_dir)
    manifest = read_json(packed / "manifest.json")
    if manifest is None or not isinstance(manifest.get("files"), list) or not manifest["files"]:
        raise BadManifest(f"{packed / 'manifest.json'} is missing or has no list of files")
    for entry in manifest["files"]:
        path, sha256 = _checked(entry)
        yield path, packed / path, sha256
    yield "manifest.json", packed / "manifest.json", None
    for name in _REPORT_FILES:
        yield f"report/{name}", report_dir(job_dir) / name, None


def _checked(entry: Any) -> tuple[str, str]:
    """Path and hash of one manifest entry; refuses paths that leave the folder."""
    path = entry.get("path") if isinstance(entry, dict) else None
    sha256 = entry.get("sha256") if isinstance(entry, dict) else None
    if not isinstance(path, str) or not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise BadManifest(f"manifest entry {entry!r} needs a path and a sha256 of 64 hex digits")
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or str(pure) != path or path == "manifest.json":
        raise BadManifest(f"manifest entry {path!r} is not a plain path inside the checkpoint folder")
    return path, sha256
