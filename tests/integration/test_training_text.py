"""Stage `prepare` on a real model and tokenizer: the windows it leaves for training, and what damage to them does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.journal import Journal
from jobs.json_files import write_json
from jobs.spec import DataSource, JobSpec
from jobs.stages import prepare as stage
from jobs.stages.init import calibration_batches
from jobs.stages.prepare import enough_tokens, prepare
from jobs.workspace import Workspace
from kbop_core.documents import read_documents
from kbop_core.errors import DamagedTokens, TextTooShort
from kbop_core.shard import Gang
from kbop_core.text import WindowOrder, training_windows

Make = Callable[..., Workspace]


@pytest.fixture
def job(tiny, tmp_path: Path) -> Make:
    """A prepared one-rank job with changed fields; stories are trained on, the page is evaluated on."""

    def make(rank: int = 0, ranks: int = 1, **fields: Any) -> Workspace:
        torch.set_num_threads(1)
        sources = {"data": [{"source": str(tiny.stories)}], "eval": [{"source": str(tiny.page)}]}
        spec, gang = JobSpec.model_validate(tiny.spec(**(sources | fields))), Gang(rank, ranks)
        space = Workspace(tmp_path / "job", spec, 1, gang, torch.device("cpu"), Journal(None))
        if not space.facts("prepare"):
            write_json(space.folder("stages") / "prepare.json", prepare(space))
        return space

    return make


def more_stories(folder: Path, *texts: str) -> str:
    (folder / "more.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(folder / "more.jsonl")


def test_the_windows_and_their_order_are_those_of_all_documents_in_memory(job: Make, tiny) -> None:
    space = job(seed=5, data=[{"source": str(tiny.stories)}, {"source": str(tiny.train)}])
    documents = [*read_documents(tiny.stories), *read_documents(tiny.train)]
    ids = training_windows(documents, space.tokenizer.encode, 64, "all")
    places = range(len(ids) - 9, len(ids) + 9)
    expected = ids[list(WindowOrder(len(ids), 5).indices(places.start, places.stop))]
    assert torch.equal(space.windows.take(places), expected)
    assert space.facts("prepare")["training_windows"] == len(ids)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_calibrate_on_the_first_windows_of_the_order_each_on_its_own(job: Make, tiny, ranks: int) -> None:
    space = job(method={"calibration_tokens": 10 * 64})
    shares = [
        torch.cat(calibration_batches(job(r, ranks, method={"calibration_tokens": 10 * 64}))) for r in range(ranks)
    ]
    expected = space.windows.take(range(10))
    assert all(torch.equal(share, expected[rank::ranks]) for rank, share in enumerate(shares))


def test_a_mixture_draws_windows_by_weight(job: Make, tiny, tmp_path: Path) -> None:
    other = more_stories(tmp_path, "zzzz " * 400, "")
    space = job(data=[{"source": str(tiny.stories), "weight": 3}, {"source": other, "weight": 1}])
    z = space.tokenizer.encode("zzzz zzzz")[2]
    assert int((space.windows.take(range(40)) == z).any(1).sum()) == 10
    described = space.facts("prepare")["training"]
    assert [(d["source"], d["weight"], d["read_to_its_end"]) for d in described] == [
        ("stories.jsonl", 3.0, True),
        ("more.jsonl", 1.0, True),
    ]


def test_a_source_of_a_mixture_without_a_window_is_refused_by_name(job: Make, tiny, tmp_path: Path) -> None:
    short = more_stories(tmp_path, "few", "words")
    with pytest.raises(TextTooShort, match=r"more\.jsonl has \d+ tokens, fewer than one window of 64"):
        job(data=[{"source": str(tiny.stories), "weight": 1}, {"source": short, "weight": 1}])


def test_a_damaged_token_file_sends_the_next_attempt_back_to_prepare_which_mends_it(job: Make) -> None:
    space = job()
    file = space.token_folder(0) / "part-000000.bin"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DamagedTokens, match=r"source-0/part-000000\.bin"):
        _ = space.windows
    assert not space.facts("prepare")
    assert torch.equal(job().windows.rows([0]), space.open_windows(64).rows([0]))
    assert file.read_bytes() == content


def test_the_digest_of_the_text_changes_with_the_text_alone(job: Make, tiny, tmp_path: Path) -> None:
    digests = []
    for seed, texts in ((0, ["some words " * 40]), (1, ["some words " * 40]), (1, ["other words " * 40])):
        space = job(seed=seed, data=[{"source": more_stories(tmp_path, *texts, "a story")}])
        digests.append(space.facts("prepare")["training_text_sha256"])
        (space.work / "stages" / "prepare.json").unlink()
    assert digests[0] == digests[1] != digests[2]


def test_a_large_source_is_read_until_it_has_enough(
    job: Make, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "READ_AT_LEAST", 1)
    broken = Path(more_stories(tmp_path, *["a few words of a story"] * 1500))
    broken.write_text(broken.read_text() + "{broken\n")
    facts = job(data=[{"source": str(broken)}], method={"tokens": 100, "calibration_tokens": 100}).facts("prepare")
    assert [(d["documents"], d["read_to_its_end"]) for d in facts["training"]] == [(512, False)]


def test_each_source_is_read_for_its_share_of_what_the_run_sees() -> None:
    base = {"model": "builtin:demo", "method": {"tokens": 10**9}}
    data = [{"source": "/a.txt", "weight": 3}, {"source": "/b.txt", "weight": 1}, {"source": "/c.txt", "weight": 1e-3}]
    spec = JobSpec.model_validate(base | {"data": data})
    first, second, third = enough_tokens(spec, spec.data)
    assert (first, second) == pytest.approx((3e9 / 4.001, 1e9 / 4.001), abs=1)
    assert third == stage.READ_AT_LEAST
    assert enough_tokens(spec, [DataSource(source="/a.txt")] * 2) == [10**9] * 2
