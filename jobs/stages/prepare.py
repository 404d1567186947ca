"""Stage `prepare`: check the model, tokenise the text into token files, cut evaluation windows. All ranks tokenise.

Trains and changes no weight. What a killed attempt tokenised is kept (kbop_core/token_files.py).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jobs.source_text import (
    EvaluationText,
    HeldOut,
    read_evaluation,
    read_side,
    refuse_shared_source,
    set_name,
    version_of,
)
from jobs.spec import DataSource, JobSpec, weights_of
from jobs.workspace import Workspace
from kbop_core.checkpoint import save_tensors
from kbop_core.convert import check_finite
from kbop_core.errors import BadWeights, UnsupportedModel
from kbop_core.hf import context_length, vocabulary_size
from kbop_core.loop import layout_steps
from kbop_core.perplexity import evaluate as score
from kbop_core.text import Windows, evaluation_windows
from kbop_core.token_files import Index, Recipe, check_vocabulary, read_index, tokenise

#: Tokens of a source that are read even if the run sees fewer: windows are drawn from all of a small source, and from
#: more than its beginning of a large one. 32 MiB on disk.
READ_AT_LEAST = 2**24


def prepare(space: Workspace) -> dict[str, Any]:
    """Write the token files of the training sources, and the windows of the evaluation sets."""
    train, evaluation = space.spec.resolved_data()
    refuse_shared_source(train, evaluation)
    if space.leads:
        check_finite(space.teacher)
        plan = space.plan
        space.journal.note(f"{len(plan.binary)} layers become binary, {len(plan.kept)} linear layers stay")
    context = training_context(space)
    sets = [read_evaluation(source) for source in evaluation]  # every rank needs them, to keep them out of training
    _tokenise_sources(space, train, HeldOut(sets))
    if not space.leads:
        return {}
    windows = space.open_windows(context)
    check_teacher(space, windows.rows([0]))
    indexes = [read_index(space.token_folder(number)) for number in range(len(train))]
    return {
        "context": context,
        "tokenizer": type(space.tokenizer).__name__,
        "begins_with_bos": space.tokenizer.encode("a")[0] == space.tokenizer.bos_token_id,
        "perplexity_per": "token",
        "training_windows": len(windows),
        "windows_per_step": layout_steps(space.spec.method.batch_tokens, context, space.gang.size, 1).windows,
        "training_tokens": len(windows) * context,
        "training_text_sha256": hashlib.sha256("".join(i.text_sha256 for i in indexes).encode()).hexdigest(),
        "training": [_describe(source, index) for source, index in zip(train, indexes, strict=True)],
        "evaluation": [_cut_evaluation(space, number, text) for number, text in enumerate(sets)],
    }


def _tokenise_sources(space: Workspace, sources: Sequence[DataSource], held_out: HeldOut) -> None:
    vocabulary = vocabulary_size(space.teacher)
    tokenizer = hashlib.sha256(json.dumps(sorted(space.tokenizer.get_vocab().items())).encode()).hexdigest()
    for number, (source, enough) in enumerate(zip(sources, enough_tokens(space.spec, sources), strict=True)):
        side, folder = read_side(source), space.folder(f"tokens/source-{number}")
        made_from = " ".join([version_of(source), str(vocabulary), tokenizer, held_out.digest()])
        recipe = Recipe(
            tokenize=space.tokenizer.encode,
            vocabulary=vocabulary,
            keep=side.keep,
            check=held_out.refuse,
            made_from=hashlib.sha256(made_from.encode()).hexdigest(),
        )

        def tell(tokens: int, enough: int = enough) -> None:
            if enough > READ_AT_LEAST:  # otherwise it is soon done, and mostly by the source's end
                space.journal.progress(min(tokens, enough), enough)

        tokenise(side.rows, recipe, folder, enough, space.gang, space.device, tell)
        index = read_index(folder)
        end = "" if index.whole else ", enough for this run"
        space.journal.note(f"{set_name(source)}: {index.documents:,} documents, {index.tokens:,} tokens{end}")


def enough_tokens(spec: JobSpec, sources: Sequence[DataSource]) -> list[int]:
    """Tokens of each source after which no more of it is read: its share of what the run sees, or READ_AT_LEAST.

    Without weights shares are not known before all is read: then no source has less than the whole run sees.
    """
    weights = weights_of(sources)
    shares = [weight / sum(weights) for weight in weights] if weights else [1.0] * len(sources)
    seen = max(spec.train_tokens, spec.method.calibration_tokens)
    return [max(READ_AT_LEAST, math.ceil(share * seen)) for share in shares]


def _describe(source: DataSource, index: Index) -> dict[str, Any]:
    return {
        "source": set_name(source),
        "weight": source.weight,
        "documents": index.documents,
        "tokens": index.tokens,
        "read_to_its_end": index.whole,
    }


def _cut_evaluation(space: Workspace, number: int, text: EvaluationText) -> dict[str, Any]:
    """Save an evaluation set's windows; returns what the report says about it."""
    windows = evaluation_windows(text.documents, space.tokenizer.encode, context_length(space.teacher), text.name)
    check_vocabulary(int(windows.ids_NT.max()), vocabulary_size(space.teacher))
    path = space.folder("tokens") / f"eval-{number}.safetensors"
    save_tensors({"ids": windows.ids_NT, "lengths": windows.lengths_N}, path)
    protocol = windows.protocol if text.whole else f"the first {windows.protocol}"
    return {"set": text.name, "protocol": protocol, "tokens": windows.predicted}


def training_context(space: Workspace) -> int:
    """Tokens in a training window: what was asked, or the model's own context up to 2048.

    Raises:
        UnsupportedModel: more than the model has positions for.
    """
    asked, most = space.spec.method.context, context_length(space.teacher, most=2**31)
    if asked is not None and asked > most:
        raise UnsupportedModel(f"method.context is {asked}; legal: 2 … {most}, the model's own", "lower it or drop it")
    return asked or context_length(space.teacher)


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
