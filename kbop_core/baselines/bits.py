"""Owns what a binary layer of any method costs to store: one bit a sign and 16 bits for every other number.

Refuses layers it does not know: a count that leaves something out would flatter its method. Biases are not counted:
they are in the model before and after. Neither is the padding of packed rows to whole bytes (checkpoint.py), which
every method would pay alike; nor latent weights beyond their signs: they live in training only.
"""

from __future__ import annotations

from torch import Tensor, nn

from kbop_core.layers import BinaryLayer

#: Bits of a stored real number: a scale, a router's weight.
NUMBER_BITS = 16


def stored_bits(layer: nn.Module) -> int:
    """Bits that inference needs of one layer: O·I + 16 × numbers other than bias and latent weights.

    Args:
        layer: a `BinaryLayer`, or a baseline whose signs are those of its parameter `latent` (O, I).

    Raises:
        TypeError: neither of them.
    """
    if isinstance(layer, BinaryLayer):
        return layer.signs_count + NUMBER_BITS * layer.weight_scale.numel()
    latent = getattr(layer, "latent", None)
    if not isinstance(latent, Tensor):
        raise TypeError(f"{type(layer).__name__} is no binary layer: it has no `latent` whose signs are stored")
    held = [*layer.named_parameters(), *layer.named_buffers()]
    return latent.numel() + NUMBER_BITS * sum(t.numel() for name, t in held if name not in ("latent", "bias"))
