"""Owns the words of the demo teacher's model card; the numbers come from the run that made the weights.

Refuses to measure or to round away anything itself, and imports nothing.
"""

from __future__ import annotations

_CARD = """\
---
language: en
library_name: transformers
license: apache-2.0
pipeline_tag: text-generation
tags: [llama, from-scratch, byte-level-bpe]
---

# The demo's teacher

A LLaMA of {parameters:,} parameters that writes like Python's documentation. It exists so that the demo and
the tests of this project have a real pretrained model without a network: `builtin:demo` is this folder.

| | |
|---|---|
| architecture | `LlamaForCausalLM`, {layers} blocks, tied embeddings, context {context} |
| widths | hidden 128, FFN 384, 4 heads and 2 key-value heads of 32 |
| tokenizer | byte-level BPE, {vocab} tokens; `<s>` before each text; any text round-trips |
| stored as | float16 ({megabytes:.2f} MB); meant to be loaded in float32, and evaluated so |
| held-out perplexity | **{perplexity:.4f}** per token ({bits_per_byte:.4f} bits per byte) |
| training perplexity | {train_perplexity:.4f} (as many windows, from the beginning of the training text) |

## Text

`builtin:python-docs` (`jobs/demo/corpus.py`) under Python {python}: {documents:,} documents, {bytes:,} bytes,
which are the sections of `pydoc_data.topics` and the docstrings of the standard library. sha256 of the texts
in order, each ended by a zero byte: `{digest}`.

Split rule (`jobs/split.py`): a document is held out when the first 8 bytes of the sha256 of its text, as a
big-endian number, are divisible by 10. {held_out} documents, {held_out_share:.1%} of the bytes, were held
out. Neither the tokenizer nor a gradient saw them.

## How it was made

    {command}

{steps:,} steps of {batch_windows} windows of {context} tokens ({epochs:.1f} passes over {train_tokens:,}
training tokens) in {seconds:,.0f} seconds of processor time on one core; torch {torch}, transformers
{transformers}, seed {seed}. AdamW, betas {betas}, peak learning rate {peak_lr:g}, {warmup_steps} steps of
warm-up, then a cosine; weight decay {weight_decay:g} on the matrices; gradients clipped to norm 1. The
weights are those of step {best_step:,}, the lowest of {looks} held-out losses seen on the way: that choice
and a dozen short trials of other recipes are all that the held-out text was used for.

## Perplexity protocol

Held-out documents in a row, each behind one `<s>`; non-overlapping windows of {context} tokens, the tail
dropped ({eval_windows} windows); mean over the shifted positions of the windows, summed in float64; weights
as stored, computed in float32; `exp` of the mean. Before rounding to float16: {unrounded_perplexity:.4f}.

## A sample

Seed {seed}, the folder's generation defaults:

```text
{sample}
```

## Limits

It knows the sound of technical English and little else: it states nothing you may rely on, answers no
questions, and has never seen `</s>` or a text longer than {context} tokens.

On Python versions other than {python} its held-out perplexity is too good. They carry edited texts, an edited
document may change sides, and then this model was trained on most of it. The first such teacher, trained under
Python 3.11.7, had a perplexity of 18.46 there, and of 13.86 and 13.68 under Python 3.12.1 and 3.13.0, where
about a third of the held-out characters are in its training text. Compare models under one Python version.

The text it was trained on is under the Python Software Foundation's licence.
"""


def model_card(facts: dict[str, object]) -> str:
    """The card, in Markdown.

    Args:
        facts: Every name that the template holds in braces.

    Raises:
        KeyError: A fact is missing.
    """
    return _CARD.format(**facts)
