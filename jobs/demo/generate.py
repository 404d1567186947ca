"""Loads a packed checkpoint as any user of transformers does, and prints a sample. Nothing of ours but one import."""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kbop_core


def main() -> None:
    """`python -m jobs.demo.generate FOLDER [--prompt TEXT]`."""
    parser = argparse.ArgumentParser(description="Generate text from a packed checkpoint.")
    parser.add_argument("folder")
    parser.add_argument("--prompt", default="Return a list of")
    options = parser.parse_args()
    kbop_core.register()
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    ids = tokenizer(options.prompt, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.eos_token_id or 0)
    print(tokenizer.decode(out[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
