"""Stage `prepare`: check the model, read and tokenise the text, cut it into windows. Trains and changes no weight."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.demo.corpus import documents as python_docs
from jobs.sources import locate_data
from jobs.spec import DataSource
from jobs.split import is_held_out
from jobs.workspace import Workspace
from kbop_core.checkpoint import save_tensors
from kbop_core.convert import check_finite
from kbop_core.errors import DataOverlap
from kbop_core.hf import context_length
from kbop_core.text import (
    evaluation_windows,
    read_documents,
    read_hub_documents,
    split_documents,
    training_windows,
)


def prepare(space: Workspace) -> dict[str, Any]:
    """Write the token windows; rank 0 alone works."""
    if not space.leads:
        return {}
    check_finite(space.teacher)
    plan = space.plan
    space.journal.note(f"{len(plan.binary)} layers become binary, {len(plan.kept)} linear layers stay")
    train, evaluation = space.spec.resolved_data()
    training_text = [text for source in train for text in read_source(source)]
    sets = [(set_name(source), read_source(source)) for source in evaluation]
    refuse_overlap(train, evaluation, training_text, [text for _, texts in sets for text in texts])
    context = space.spec.method.context or context_length(space.teacher)
    folder = space.folder("tokens")
    ids = training_windows(training_text, space.tokenizer.encode, context, "the training text")
    save_tensors({"ids": ids}, folder / "train.safetensors")
    described = []
    for number, (name, texts) in enumerate(sets):
        windows = evaluation_windows(texts, space.tokenizer.encode, context_length(space.teacher), name)
        save_tensors({"ids": windows.ids_NT, "lengths": windows.lengths_N}, folder / f"eval-{number}.safetensors")
        described.append({"set": name, "protocol": windows.protocol, "tokens": windows.predicted})
    return {
        "context": context,
        "training_windows": len(ids),
        "training_tokens": ids.numel(),
        "training_text_sha256": _digest(training_text),
        "evaluation": described,
    }


def read_source(source: DataSource) -> list[str]:
    """Documents of one source's side of the split."""
    found = locate_data(source.source)
    if found.kind == "builtin":
        documents = [document.text for document in python_docs()]
    elif found.kind == "file":
        documents = read_documents(Path(found.location))
    else:
        documents = read_hub_documents(found.location, found.revision)
    return split_documents(documents, source.split, is_held_out)


def set_name(source: DataSource) -> str:
    """How the report calls an evaluation set: file name, built-in name or hub id, and the split unless it is all."""
    name = source.source.rsplit("/", 1)[-1] if source.source.startswith(("/", ".", "~")) else source.source
    return name if source.split == "all" else f"{name} ({source.split} split)"


def refuse_overlap(
    train: Sequence[DataSource], evaluation: Sequence[DataSource], train_text: Sequence[str], eval_text: Sequence[str]
) -> None:
    """Refuse text that is trained on and evaluated on.

    Raises:
        DataOverlap: one source on both sides with splits that meet, or a document that both sides hold.
    """
    for used in evaluation:
        for other in train:
            if used.source == other.source and {used.split, other.split} != {"train", "eval"}:
                raise DataOverlap(
                    f"{used.source} is trained on ({other.split}) and evaluated on ({used.split})",
                    "use split `train` in `data` and `eval` in `eval`, or other text",
                )
    shared = {hash(t) for t in train_text} & {hash(t) for t in eval_text}
    if shared:
        example = next(t for t in eval_text if hash(t) in shared)
        raise DataOverlap(
            f"{len(shared)} documents are both in the training and the evaluation text, for example {example[:60]!r}",
            "remove them from one side",
        )


def _digest(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()
