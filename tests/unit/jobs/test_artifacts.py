"""The content-addressed store: whole files or none."""

from __future__ import annotations

import errno
import hashlib
import os

import pytest

from jobs.artifacts import ArtifactStore, disk_shortage
from jobs.errors import BlobMissing, DiskFull, HashMismatch


@pytest.fixture
def blobs(tmp_path):
    return ArtifactStore(tmp_path / "artifacts")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights" * 1000)
    return path


def stored(blobs):
    return [path for path in blobs.root.rglob("*") if path.is_file()]


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_a_file_comes_back_under_its_hash(blobs, tmp_path, size):
    data = os.urandom(size)
    (tmp_path / "f").write_bytes(data)
    blob = blobs.put(tmp_path / "f", hashlib.sha256(data).hexdigest())
    assert blob.size == size and blobs.path(blob.sha256).read_bytes() == data


def test_storing_the_same_bytes_twice_keeps_one_file(blobs, source):
    assert blobs.put(source) == blobs.put(source)
    assert len(stored(blobs)) == 1


def test_a_file_that_is_not_what_was_announced_is_not_stored(blobs, source):
    with pytest.raises(HashMismatch, match="expected 0000"):
        blobs.put(source, "0" * 64)
    assert stored(blobs) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_no_file_and_says_so(blobs, source, monkeypatch, number):
    def full(_handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("jobs.artifacts.os.fsync", full)
    with pytest.raises(DiskFull, match=r"no space .* 'model.safetensors'"):
        blobs.put(source)
    assert stored(blobs) == []


def test_only_what_killed_writers_left_is_removed(blobs, source):
    blob = blobs.put(source)
    old, new = blobs.root / "tmp" / "old", blobs.root / "tmp" / "new"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    blobs.remove_stale()
    assert sorted(stored(blobs)) == sorted([new, blobs.path(blob.sha256)])


@pytest.mark.parametrize("sha256", ["", "ab", "../../etc/passwd", "A" * 64, "0" * 64])
def test_a_hash_without_a_file_is_missing(blobs, sha256):
    with pytest.raises(BlobMissing):
        blobs.path(sha256)


def test_the_disk_floor_gives_a_reason_only_below_it(tmp_path):
    assert disk_shortage(tmp_path, 0) is None
    assert "below the floor" in (disk_shortage(tmp_path, 1 << 60) or "")
