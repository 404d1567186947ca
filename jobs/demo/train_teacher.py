"""Owns the recipe of the demo's teacher: how `jobs/demo/teacher/` is made from the demo's text.

Refuses to train on a held-out document, to use a GPU, or to be part of a job: people run it by hand.

    OMP_NUM_THREADS=1 python -m jobs.demo.train_teacher --out jobs/demo/teacher

A byte-level BPE tokenizer and a small LLaMA, both trained on the train part of `jobs.demo.corpus` with one
thread. The same seed, Python, torch and kind of processor give the same files. Every in-features width is a
multiple of 128, one scale group of KBOP.

Tried and left out, after about 250 seconds of a shared core each, so a hint rather than a measurement; in
bits per byte of the held-out part: 2048 tokens of vocabulary 2.23 against 2.17; 16 windows a step 2.46 and
4 windows 2.21 against 2.17 of 8; 6 blocks 2.17 against 2.06 of 4. At equal steps a rate of 6e-3 was 0.08
nats worse, a second beta of 0.99 was 0.02 worse. A step in bfloat16 took ten times as long.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from jobs.demo.corpus import documents
from jobs.demo.model_card import model_card
from jobs.split import is_held_out

BOS, EOS = "<s>", "</s>"

#: Base of the rotary angles.
ROPE_THETA = 10_000.0

#: Largest relative change of the held-out perplexity that storing float16 may cause.
FLOAT16_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the result, beside the text.

    Attributes:
        steps: Optimizer steps, at least 1.
        seed: Seed of the weights and of the order of the windows.
        vocab: Tokens of the vocabulary; the 256 bytes and the two special ones are among them.
        layers: Decoder blocks.
        context: Tokens of a window, in training and evaluation.
        batch_windows: Windows of a step.
        peak_lr: AdamW's learning rate after the warm-up; a cosine takes it to a hundredth.
        betas: AdamW's decay of the gradient's mean and of its square.
        warmup_steps: Steps in which the rate grows linearly.
        weight_decay: AdamW's decoupled decay of the matrices; norms have none.
        evaluate_every: Steps between two looks at the held-out loss; the best weights are kept.
    """

    steps: int = 4000
    seed: int = 0
    vocab: int = 1024
    layers: int = 4
    context: int = 256
    batch_windows: int = 8
    peak_lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 100
    weight_decay: float = 0.1
    evaluate_every: int = 200


@dataclass(frozen=True, slots=True)
class Text:
    """The corpus as the run uses it: all texts, and the two parts as tokens in a row, int64 [T]."""

    all: list[str]
    held_out: list[str]
    tokenizer: PreTrainedTokenizerFast
    train_T: Tensor
    eval_T: Tensor


def train_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text has tokens, and decoding them gives the text back byte for byte.

    `<s>` comes first in every encoded text. `</s>` exists because tools expect it; the teacher never saw one.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def read_text(vocab: int) -> Text:
    """The corpus, the tokenizer of its train part, and both parts encoded with one BOS per document."""
    texts = [document.text for document in documents()]
    train = [text for text in texts if not is_held_out(text)]
    held_out = [text for text in texts if is_held_out(text)]
    tokenizer = train_tokenizer(train, vocab)

    def stream(part: list[str]) -> Tensor:
        return torch.tensor([token for text in part for token in tokenizer(text)["input_ids"]])

    return Text(texts, held_out, tokenizer, stream(train), stream(held_out))


def windows(stream_T: Tensor, context: int, start: int = 0) -> Tensor:
    """Non-overlapping windows from `start`, int64 [B, context]; a view. A tail that fills none is dropped."""
    count = (len(stream_T) - start) // context
    return stream_T[start : start + count * context].view(count, context)


def token_nll(model: LlamaForCausalLM, batch_BT: Tensor) -> Tensor:
    """Nats of every token but the first of each window, float32 [B * (T - 1)]."""
    logits_BTV = model(input_ids=batch_BT, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits_BTV.flatten(0, 1), batch_BT[:, 1:].flatten(), reduction="none")


def mean_nll(model: LlamaForCausalLM, windows_BT: Tensor) -> float:
    """Mean nats of a token over all windows by the protocol of the model card, summed in float64."""
    model.train(False)
    with torch.no_grad():
        nats = torch.stack([token_nll(model, batch_BT).double().sum() for batch_BT in torch.split(windows_BT, 1)])
    return float(nats.sum()) / windows_BT[:, 1:].numel()


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The teacher before its first step; embeddings begin at 0.05, 0.04 nats better than 0.02 after 200 steps."""
    return begin(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=recipe.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=recipe.context,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
        recipe.seed,
        embedding_spread=0.05,
    )


def begin(config: LlamaConfig, seed: int, embedding_spread: float) -> LlamaForCausalLM:
    """Random weights from torch's global generator, seeded here.

    What a block adds to the residual begins at zero: 0.05 nats better after 300 steps than a random beginning.

    Args:
        config: the architecture.
        seed: of the weights.
        embedding_spread: standard deviation of the embeddings.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=embedding_spread)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def batches(stream_T: Tensor, recipe: Recipe) -> Iterator[Tensor]:
    """Endless batches, int64 [batch_windows, context]: each epoch cuts the stream elsewhere and shuffles."""
    generator = torch.Generator().manual_seed(recipe.seed)
    while True:
        start = int(torch.randint(recipe.context, (), generator=generator))
        cut_BT = windows(stream_T, recipe.context, start)
        order_B = torch.randperm(len(cut_BT), generator=generator)
        for chosen_B in torch.split(order_B, recipe.batch_windows):
            if len(chosen_B) == recipe.batch_windows:
                yield cut_BT[chosen_B]


def learning_rate(step: int, recipe: Recipe) -> float:
    """Rate of step 0, 1, ...: linear warm-up, then a cosine from the peak to a hundredth of it."""
    if step < recipe.warmup_steps:
        return recipe.peak_lr * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / (recipe.steps - recipe.warmup_steps)
    return recipe.peak_lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def new_optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with decay on the matrices alone."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    norms = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": norms, "weight_decay": 0.0}],
        lr=recipe.peak_lr,
        betas=recipe.betas,
    )


def train(model: LlamaForCausalLM, text: Text, recipe: Recipe) -> int:
    """Trains in place, prints progress, and leaves the weights with the lowest held-out loss.

    Returns:
        The step those weights come from, counted from 1.
    """
    optimizer, source = new_optimizer(model, recipe), batches(text.train_T, recipe)
    eval_BT = windows(text.eval_T, recipe.context)
    best, best_step, best_weights = math.inf, 0, model.state_dict()
    losses: list[float] = []
    for step in range(1, recipe.steps + 1):
        losses.append(train_step(model, optimizer, next(source), learning_rate(step - 1, recipe)))
        if step % recipe.evaluate_every and step != recipe.steps:
            continue
        held_out, recent = mean_nll(model, eval_BT), losses[-100:]
        print(
            f"step {step}/{recipe.steps}: train loss {sum(recent) / len(recent):.4f}, "
            f"held out {held_out:.4f} (perplexity {math.exp(held_out):.3f}), {time.process_time():.0f} s",
            flush=True,
        )
        if held_out < best:
            best, best_step = held_out, step
            best_weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(best_weights)
    return best_step


def train_step(model: LlamaForCausalLM, optimizer: torch.optim.AdamW, batch_BT: Tensor, rate: float) -> float:
    """One step on one batch; returns its mean loss in nats."""
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = token_nll(model, batch_BT).mean()
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes the folder that `from_pretrained` reads; the model's own weights become float16."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        # `<s>` ends a text too: it is where training met the next document.
        eos_token_id=[tokenizer.eos_token_id, tokenizer.bos_token_id],
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        max_new_tokens=128,
    )
    model.half().save_pretrained(out)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(out)
    # Readers before transformers 5 know neither `rope_parameters` nor the name that 5 gives its tokenizers.
    amend(out / "config.json", rope_theta=ROPE_THETA)
    amend(out / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    (out / "model.safetensors").chmod(0o644)  # safetensors writes 0600, which an image copy would keep


def amend(file: Path, **entries: object) -> None:
    """Sets entries of a JSON object on disk; keys end up sorted."""
    whole = json.loads(file.read_text(encoding="utf-8")) | entries
    file.write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_rounding(exact: float, stored: float) -> None:
    """Refuses float16 weights that say something else than the trained ones.

    Args:
        exact: Held-out loss of the float32 weights, nats per token.
        stored: The same of the folder, as loaded from disk in float32.

    Raises:
        ValueError: The perplexities differ by more than `FLOAT16_TOLERANCE`.
    """
    if abs(math.expm1(stored - exact)) > FLOAT16_TOLERANCE:
        raise ValueError(
            f"float16 moved the held-out perplexity from {math.exp(exact):.4f} to {math.exp(stored):.4f}, "
            f"more than {FLOAT16_TOLERANCE:.1%}: store the teacher in float32"
        )


def sample(model: LlamaForCausalLM, out: Path, seed: int) -> str:
    """What the teacher says after "The module", drawn with the folder's tokenizer and generation defaults."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    torch.manual_seed(seed)
    prompt_BT = tokenizer("The module", return_tensors="pt")["input_ids"]
    tokens_BT = model.generate(input_ids=prompt_BT)
    return str(tokenizer.decode(tokens_BT[0], skip_special_tokens=True))


def make_teacher(recipe: Recipe, out: Path) -> None:
    """Text, training, folder, card. Overwrites the files of an earlier teacher in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    text = read_text(recipe.vocab)
    model = new_model(recipe, text.tokenizer)
    print(f"{len(text.train_T)} training tokens, {len(text.eval_T)} held out", flush=True)
    best_step = train(model, text, recipe)
    seconds = time.process_time()
    eval_BT = windows(text.eval_T, recipe.context)
    exact = mean_nll(model, eval_BT)
    save(model, text.tokenizer, out)
    stored_model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    stored = mean_nll(stored_model, eval_BT)
    check_rounding(exact, stored)
    facts = {
        **asdict(recipe),
        **text_facts(text),
        "parameters": model.num_parameters(),
        "megabytes": (out / "model.safetensors").stat().st_size / 1e6,
        "perplexity": math.exp(stored),
        "unrounded_perplexity": math.exp(exact),
        "bits_per_byte": stored / math.log(2) * len(text.eval_T) / sum(len(t.encode()) for t in text.held_out),
        "train_perplexity": math.exp(mean_nll(stored_model, windows(text.train_T, recipe.context)[: len(eval_BT)])),
        "eval_windows": len(eval_BT),
        "best_step": best_step,
        "looks": math.ceil(recipe.steps / recipe.evaluate_every),
        "epochs": recipe.steps * recipe.batch_windows * recipe.context / len(text.train_T),
        "seconds": seconds,
        "command": f"OMP_NUM_THREADS=1 python -m jobs.demo.train_teacher --out DIR "
        f"--steps {recipe.steps} --seed {recipe.seed}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sample": sample(stored_model, out, recipe.seed),
    }
    (out / "README.md").write_text(model_card(facts), encoding="utf-8")
    print(f"held-out perplexity {math.exp(stored):.4f}; {seconds:.0f} s of processor time; wrote {out}")


def text_facts(text: Text) -> dict[str, object]:
    """What the card says about the corpus."""
    size = sum(len(t.encode()) for t in text.all)
    return {
        "documents": len(text.all),
        "bytes": size,
        "digest": hashlib.sha256(b"".join(t.encode() + b"\0" for t in text.all)).hexdigest(),
        "held_out": len(text.held_out),
        "held_out_share": sum(len(t.encode()) for t in text.held_out) / size,
        "train_tokens": len(text.train_T),
    }


def main(argv: list[str] | None = None) -> None:
    """Trains the demo's teacher and writes its folder."""
    parser = argparse.ArgumentParser(prog="python -m jobs.demo.train_teacher", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data order (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1:
        parser.error(f"--steps is {arguments.steps}: give at least 1")
    torch.set_num_threads(1)
    make_teacher(Recipe(steps=arguments.steps, seed=arguments.seed), arguments.out)


if __name__ == "__main__":
    main()
