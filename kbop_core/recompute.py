"""Owns activation checkpointing: decoder blocks forget what they computed and compute it again in backward.

Non-reentrant, so that gradients of scales and the sinks of signs see one backward pass per micro-step. Refuses to
choose when it pays (`kbop plan` says what it saves: all but a block's input per window, for one more forward pass).
"""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from kbop_core.convert import decoder_blocks


def recompute_blocks(model: nn.Module) -> None:
    """Checkpoint every decoder block of a model that has no dropout, or has it switched off; once per model."""
    for name in decoder_blocks(model):
        block = model.get_submodule(name)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
