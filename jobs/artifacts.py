"""Published files by content: bytes come in under their sha256 and never change afterwards.

Refuses to know jobs, names or paths of a checkpoint: those are rows in the store.

    root/sha256/ab/<hex>     one blob
    root/tmp/                files on their way in; none of them is ever served
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from jobs.errors import BlobMissing, DiskFull, HashMismatch

_CHUNK = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class ArtifactBlob:
    """A stored file: `sha256` in hex, `size` in bytes."""

    sha256: str
    size: int


class ArtifactStore:
    """Content-addressed files under one folder, which must lie on one file system."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, source: Path, sha256: str | None = None) -> ArtifactBlob:
        """Copy a file in.

        Args:
            source: The file; it is read once and hashed on the way.
            sha256: What its content must be; None takes whatever it is.

        Raises:
            HashMismatch: The content is something else; nothing was stored.
            DiskFull: No room; nothing was stored and the temporary file is gone.
        """
        folder = self.root / "tmp"
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder)
        temporary = Path(name)
        try:
            with open(handle, "wb") as target, source.open("rb") as file:
                blob = _copy(file, target)
            if sha256 is not None and blob.sha256 != sha256:
                raise HashMismatch(source, sha256, blob.sha256)
            self._admit(temporary, blob)
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise DiskFull(source) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)
        return blob

    def path(self, sha256: str) -> Path:
        """Where the blob's bytes are. Raises BlobMissing."""
        path = self._location(sha256)
        if not _SHA256.fullmatch(sha256) or not path.is_file():
            raise BlobMissing(sha256)
        return path

    def remove_stale(self, older_than_s: float = 3600.0) -> None:
        """Delete what killed writers left behind: temporary files untouched for that many seconds."""
        for path in (self.root / "tmp").glob("*"):
            if time.time() - path.stat().st_mtime > older_than_s:
                path.unlink(missing_ok=True)

    def _location(self, sha256: str) -> Path:
        return self.root / "sha256" / sha256[:2] / sha256

    def _admit(self, temporary: Path, blob: ArtifactBlob) -> None:
        """Give a complete temporary file its final name."""
        final = self._location(blob.sha256)
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary.chmod(0o444)
        temporary.replace(final)
        folder = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _copy(source: BinaryIO, target: BinaryIO) -> ArtifactBlob:
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        target.write(chunk)
        size += len(chunk)
    target.flush()
    os.fsync(target.fileno())
    return ArtifactBlob(digest.hexdigest(), size)


def disk_shortage(folder: Path, floor_bytes: int) -> str | None:
    """Why nothing should be written under `folder`: less than `floor_bytes` free; None: there is enough."""
    free = shutil.disk_usage(folder).free
    if free >= floor_bytes:
        return None
    floor_gib = floor_bytes / 2**30
    return f"the disk of {folder} has {free / 2**30:.1f} GiB free, below the floor of {floor_gib:.1f} GiB"
