"""Owns the larger teachers: their recipes, and their training from scratch, once each, into folders of the cache.

Refuses to choose text: train and validation documents are given, already apart. A recipe's name stands for its
numbers, so a folder that another recipe or other text made is an error, not a teacher.

The demo's own recipe (jobs/demo/train_teacher.py), wider and deeper. What is new is against overfitting, as the text is
small for these models: dropout on what blocks add, more decay, and an end to training when validation stops improving.
On a GPU the forward pass is bfloat16. How many steps suit them has not been measured: the best weights are kept.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from jobs.demo.train_teacher import (
    ROPE_THETA,
    Recipe,
    batches,
    begin,
    learning_rate,
    new_optimizer,
    save,
    train_step,
    train_tokenizer,
)
from kbop_core.checkpoint import folder_written_atomically, write_json
from kbop_core.perplexity import evaluate
from kbop_core.text import Windows, evaluation_windows

#: What a teacher's folder says about its making.
MADE_FILE = "made.json"
#: Width of the MLP over the hidden width; standard deviation of the embeddings at the start.
MLP_RATIO, EMBEDDING_SPREAD = 3, 0.02
EVALUATION_BATCH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class LargerRecipe(Recipe):
    """Everything that decides a larger teacher, beside the text; it reads steps × batch_windows × context tokens.

    Attributes:
        name: of its folder; another recipe needs another one.
        hidden: width of the residual stream, a multiple of `heads`; the MLP is MLP_RATIO times as wide.
        heads: attention heads, each with keys and values of its own.
        dropout: share of what each attention and each MLP adds that is left out in training, 0 ≤ … < 1.
        patience: looks at the validation loss without a new best one after which training ends, ≥ 1.
    """

    name: str
    hidden: int
    heads: int
    dropout: float = 0.1
    patience: int = 5
    vocab: int = 8192
    batch_windows: int = 64
    evaluate_every: int = 100

    def config(self, vocab: int, bos: int, eos: int) -> LlamaConfig:
        """The architecture for a tokenizer of `vocab` tokens with these two special ids."""
        return LlamaConfig(
            vocab_size=vocab,
            hidden_size=self.hidden,
            intermediate_size=MLP_RATIO * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=self.context,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            bos_token_id=bos,
            eos_token_id=eos,
        )


TEACHERS = (
    LargerRecipe(name="wikitext-10m", hidden=384, heads=6, layers=4, steps=4000, peak_lr=2e-3, dropout=0.1),
    LargerRecipe(name="wikitext-30m", hidden=512, heads=8, layers=8, steps=3000, peak_lr=1e-3, dropout=0.2),
    LargerRecipe(
        name="wikitext-100m", hidden=768, heads=12, layers=12, steps=2000, peak_lr=6e-4, dropout=0.3, weight_decay=0.2
    ),
)


def teacher_folder(
    recipe: LargerRecipe, train: Sequence[str], validation: Sequence[str], cache: Path, device: torch.device
) -> Path:
    """The teacher's folder in Hugging Face form, trained now if it is not there.

    Two processes must not ask for the same missing teacher at once.

    Args:
        recipe: how.
        train: documents that tokenizer and weights are made of.
        validation: documents that decide when training ends and which weights stay.
        cache: folder of all larger teachers.
        device: to train on.

    Raises:
        ValueError: the folder there was made by another recipe of this name, or from other text.
    """
    folder = cache / recipe.name
    made = _made(recipe, train, validation)
    if not folder.exists():
        _make(recipe, train, validation, folder, device)
    if json.loads((folder / MADE_FILE).read_text(encoding="utf-8")) != made:
        raise ValueError(f"{folder} was made by another recipe or from other text; rename the recipe or delete it")
    return folder


def _made(recipe: LargerRecipe, train: Sequence[str], validation: Sequence[str]) -> dict[str, Any]:
    """What decides a teacher, as JSON gives it back."""
    text = hashlib.sha256(json.dumps([list(train), list(validation)]).encode()).hexdigest()
    made: dict[str, Any] = json.loads(json.dumps({"recipe": asdict(recipe), "text": text}))
    return made


def _make(
    recipe: LargerRecipe, train: Sequence[str], validation: Sequence[str], folder: Path, device: torch.device
) -> None:
    tokenizer = train_tokenizer(list(train), recipe.vocab)
    stream_T = torch.tensor([token for text in train for token in tokenizer.encode(text)])
    held_out = evaluation_windows(validation, tokenizer.encode, recipe.context, "validation text")
    with torch.random.fork_rng():  # weights and dropout draw from torch's global generators
        model = _begin(recipe, tokenizer).to(device)
        _train(model, recipe, stream_T, held_out)
    with folder_written_atomically(folder) as temporary:
        save(model, tokenizer, temporary)
        write_json(temporary / MADE_FILE, _made(recipe, train, validation))


def _begin(recipe: LargerRecipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = recipe.config(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    model = begin(config, recipe.seed, EMBEDDING_SPREAD)

    def drop(module: nn.Module, _: Any, added: Tensor) -> Tensor:
        return F.dropout(added, recipe.dropout, module.training)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)
    return model


def _train(model: LlamaForCausalLM, recipe: LargerRecipe, stream_T: Tensor, held_out: Windows) -> None:
    """Trains in place and leaves the weights of the lowest validation loss.

    Args:
        model: on the device to train on.
        recipe: how.
        stream_T: training tokens in a row, int64 (T,), on the CPU; at least `batch_windows` + 1 windows.
        held_out: validation windows.

    Raises:
        ValueError: no look at the validation loss was finite.
    """
    optimizer, source, device = new_optimizer(model, recipe), batches(stream_T, recipe), model.device
    best, weights, since = math.inf, dict[str, Tensor](), 0
    with Progress() as progress:
        bar = progress.add_task(f"teacher {recipe.name}", total=recipe.steps)
        for step in range(1, recipe.steps + 1):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                train_step(model, optimizer, next(source).to(device), learning_rate(step - 1, recipe))
            progress.advance(bar)
            if step % recipe.evaluate_every and step != recipe.steps:
                continue
            found = evaluate(model.eval(), held_out, EVALUATION_BATCH)
            progress.update(bar, description=f"teacher {recipe.name}, validation perplexity {found.perplexity:.4g}")
            since += 1
            if found.nll < best:
                best, since = found.nll, 0
                weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            if since == recipe.patience:
                break
    if not weights:
        raise ValueError(f"teacher {recipe.name} diverged: its validation loss was never finite; lower peak_lr")
    model.load_state_dict(weights)
