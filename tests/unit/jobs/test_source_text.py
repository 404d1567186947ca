"""Which documents of a source are trained on, which are evaluated on, and that no text is both."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import jobs.source_text
from jobs.source_text import EvaluationText, HeldOut, read_evaluation, read_side, refuse_shared_source, version_of
from jobs.spec import DataSource
from jobs.split import is_held_out
from kbop_core.errors import DataOverlap, EmptyText

STORIES = [f"story number {n}" for n in range(40)]


def jsonl(folder: Path, texts: list[str], name: str = "a.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def side(source: str, split: str) -> list[str]:
    return list(read_side(DataSource.model_validate({"source": source, "split": split})).documents())


def test_documents_are_dealt_whole_and_each_to_one_side(tmp_path: Path) -> None:
    source = jsonl(tmp_path, ["", *STORIES])
    assert side(source, "all") == STORIES
    assert side(source, "eval") == [text for text in STORIES if is_held_out(text)] != []
    assert sorted(side(source, "train") + side(source, "eval")) == sorted(STORIES)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_source_that_is_one_document_is_cut_at_nine_tenths(tmp_path: Path, name: str) -> None:
    text = "x" * 100
    source = jsonl(tmp_path, ["", text, " "], name) if name == "a.jsonl" else str(tmp_path / name)
    if name == "a.txt":
        Path(source).write_text(text)
    assert (side(source, "train"), side(source, "eval"), side(source, "all")) == (["x" * 90], ["x" * 10], [text])


def test_a_source_without_text_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(EmptyText, match=r"blank\.jsonl"):
        side(jsonl(tmp_path, ["", " "], "blank.jsonl"), "train")


def test_the_built_in_text_has_two_sides_that_share_nothing() -> None:
    train, held_out = (set(side("builtin:python-docs", split)) for split in ("train", "eval"))
    assert train and held_out and not train & held_out


@pytest.mark.parametrize(("characters", "read"), [(1, 1), (28, 2), (10**6, 40)])
def test_evaluation_text_is_read_up_to_a_limit_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, characters: int, read: int
) -> None:
    monkeypatch.setattr(jobs.source_text, "EVALUATION_CHARACTERS", characters)
    text = read_evaluation(DataSource(source=jsonl(tmp_path, STORIES)))
    assert text == EvaluationText("a.jsonl", STORIES[:read], read == len(STORIES))


@pytest.mark.parametrize(("train", "evaluation"), [("all", "all"), ("train", "all"), ("eval", "eval"), ("all", "eval")])
def test_one_source_with_sides_that_meet_is_refused(train: str, evaluation: str) -> None:
    one, other = (DataSource.model_validate({"source": "/a.txt", "split": s}) for s in (train, evaluation))
    with pytest.raises(DataOverlap, match=rf"/a.txt is trained on \({train}\) and evaluated on \({evaluation}\)"):
        refuse_shared_source([one], [other])


def test_a_document_of_the_evaluation_text_is_refused_for_training() -> None:
    held_out = HeldOut([EvaluationText("a", ["one"], True), EvaluationText("b", ["two"], True)])
    held_out.refuse("three")
    with pytest.raises(DataOverlap, match="both in the training and the evaluation text: 'two'"):
        held_out.refuse("two")
    assert held_out.digest() == HeldOut([EvaluationText("c", ["two", "one"], True)]).digest()
    assert held_out.digest() != HeldOut([EvaluationText("a", ["one"], True)]).digest()


def test_a_file_that_changed_is_another_version_of_its_source(tmp_path: Path) -> None:
    source = DataSource(source=jsonl(tmp_path, STORIES))
    before = version_of(source)
    assert version_of(source) == before
    os.utime(source.source, (0, 0))
    assert version_of(source) != before != version_of(DataSource(source=source.source, split="train"))
