"""Stage `prepare`: check the model, read and tokenise the text, cut it into windows. Trains and changes no weight."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.demo.corpus import documents as python_docs
from jobs.sources import locate_data
from jobs.spec import DataSource
from jobs.split import is_held_out
from jobs.workspace import Workspace
from kbop_core.checkpoint import save_tensors
from kbop_core.convert import check_finite
from kbop_core.errors import BadWeights, DataOverlap, UnsupportedModel
from kbop_core.hf import context_length, vocabulary_size
from kbop_core.loop import layout_steps
from kbop_core.perplexity import evaluate as score
from kbop_core.text import (
    Windows,
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
    context = training_context(space)
    folder = space.folder("tokens")
    ids = training_windows(training_text, space.tokenizer.encode, context, "the training text")
    check_vocabulary(space, int(ids.max()))
    check_teacher(space, ids[:1])
    save_tensors({"ids": ids}, folder / "train.safetensors")
    described = []
    for number, (name, texts) in enumerate(sets):
        windows = evaluation_windows(texts, space.tokenizer.encode, context_length(space.teacher), name)
        check_vocabulary(space, int(windows.ids_NT.max()))
        save_tensors({"ids": windows.ids_NT, "lengths": windows.lengths_N}, folder / f"eval-{number}.safetensors")
        described.append({"set": name, "protocol": windows.protocol, "tokens": windows.predicted})
    return {
        "context": context,
        "tokenizer": type(space.tokenizer).__name__,
        "begins_with_bos": space.tokenizer.encode("a")[0] == space.tokenizer.bos_token_id,
        "perplexity_per": "token",
        "training_windows": len(ids),
        "windows_per_step": layout_steps(space.spec.method.batch_tokens, context, space.gang.size, 1).windows,
        "training_tokens": ids.numel(),
        "training_text_sha256": _digest(training_text),
        "evaluation": described,
    }


def training_context(space: Workspace) -> int:
    """Tokens in a training window: what was asked, or the model's own context up to 2048.

    Raises:
        UnsupportedModel: more than the model has positions for.
    """
    asked, most = space.spec.method.context, context_length(space.teacher, most=2**31)
    if asked is not None and asked > most:
        raise UnsupportedModel(f"method.context is {asked}; legal: 2 … {most}, the model's own", "lower it or drop it")
    return asked or context_length(space.teacher)


def check_vocabulary(space: Workspace, largest: int) -> None:
    """Refuse a tokenizer that is not the model's.

    Raises:
        UnsupportedModel: a token id that the model has no embedding for.
    """
    size = vocabulary_size(space.teacher)
    if largest >= size:
        raise UnsupportedModel(
            f"the tokenizer gives token {largest}, the model's embedding ends at {size - 1}",
            "the tokenizer belongs to another model: put the right one into the model's folder",
        )


def check_teacher(space: Workspace, ids: Tensor) -> None:
    """Refuse a model that gives no numbers on its own training text.

    Raises:
        BadWeights: its loss is not finite or its perplexity beyond any number.
    """
    whole = Windows(ids, torch.tensor([ids.shape[1]]), "one window")
    quality = score(space.teacher, whole, batch=1)
    if not math.isfinite(quality.perplexity):
        raise BadWeights(
            f"the model's loss on the first window of the training text is {quality.nll:g} nats per token",
            "its weights are damaged, or far too large for their dtype",
        )


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
