"""KBOP: language models with single-bit weights, trained without latent ones.

Importing this package registers the packed format with transformers:

    import kbop_core
    model = AutoModelForCausalLM.from_pretrained("folder-of-a-packed-checkpoint")
"""

from kbop_core.hf import register

register()

__all__ = ["register"]
