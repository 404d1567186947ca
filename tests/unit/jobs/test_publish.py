"""From a packed checkpoint folder to artifacts."""

from __future__ import annotations

import hashlib
import json

import pytest

from jobs.artifacts import ArtifactStore
from jobs.errors import BadManifest, HashMismatch, LeaseLost
from jobs.publish import publish


@pytest.fixture
def job_dir(tmp_path):
    packed, report = tmp_path / "work" / "packed", tmp_path / "work" / "report"
    (packed / "sub").mkdir(parents=True)
    report.mkdir()
    files = {"model.safetensors": b"bits", "sub/tokenizer.json": b"{}"}
    for path, data in files.items():
        (packed / path).write_bytes(data)
    entries = [{"path": p, "size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for p, d in files.items()]
    write_manifest(tmp_path, entries)
    (report / "report.json").write_text("{}")
    (report / "report.html").write_text("<p>")
    return tmp_path


def write_manifest(job_dir, entries):
    (job_dir / "work" / "packed" / "manifest.json").write_text(json.dumps({"files": entries}))


def run(job_dir, between_files=lambda: None):
    return publish(ArtifactStore(job_dir / "artifacts"), "job_1", job_dir, between_files)


def test_checkpoint_manifest_and_report_are_published(job_dir):
    paths = [
        "model.safetensors",
        "sub/tokenizer.json",
        "manifest.json",
        "report/report.json",
        "report/report.html",
    ]
    assert [record.path for record in run(job_dir)] == paths


def test_publishing_again_gives_the_same_records(job_dir):
    assert run(job_dir) == run(job_dir)


def test_a_file_that_changed_after_packing_is_refused(job_dir):
    (job_dir / "work" / "packed" / "model.safetensors").write_bytes(b"bitz")
    with pytest.raises(HashMismatch):
        run(job_dir)


@pytest.mark.parametrize("path", ["../spec.json", "/etc/passwd", "a/../b", "./a", "manifest.json", "", None, 3])
def test_a_manifest_that_names_anything_but_plain_paths_is_refused(job_dir, path):
    write_manifest(job_dir, [{"path": path, "sha256": "0" * 64}])
    with pytest.raises(BadManifest):
        run(job_dir)


@pytest.mark.parametrize(
    "entries", [None, [], ["model.safetensors"], [{"path": "a"}], [{"path": "gone", "sha256": "0" * 64}]]
)
def test_a_manifest_without_usable_files_is_refused(job_dir, entries):
    write_manifest(job_dir, entries)
    with pytest.raises(BadManifest):
        run(job_dir)


def test_a_lost_lease_stops_between_files(job_dir):
    def lost():
        raise LeaseLost("job_1", 1)

    with pytest.raises(LeaseLost):
        run(job_dir, lost)
