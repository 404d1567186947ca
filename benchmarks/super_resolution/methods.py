"""Owns what the rows are: each method's network body and the learning rates it is swept over.

All methods see the same batches, and train head, tail, biases (and scales, shifts, slopes) with AdamW at the same
rates. Activations are real in every row, so that only weights are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from benchmarks.super_resolution.network import Body


@dataclass(frozen=True)
class Method:
    """A row that trains.

    Attributes:
        label: as printed.
        body: of the network.
        rates: what is swept: AdamW's learning rate of real or latent weights, or KBOP's flip rate (share per step).
    """

    label: str
    body: Body
    rates: tuple[float, ...]


LATENT_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
FLIP_RATES = (2e-3, 4e-3, 1e-2, 2e-2, 4e-2)
METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "full": Method("full precision", Body("real", "torch"), (2e-3, 4e-3, 8e-3)),
        "ste": Method("STE, latent weights", Body("latent", "torch"), LATENT_RATES),
        "react": Method("ReActNet-style, latent weights", Body("latent", "torch", shifts=True), LATENT_RATES),
        "kbop": Method("KBOP from random signs, BNN Init", Body("binary", "bnn_init"), FLIP_RATES),
        # One rate: with scales that start twelve times too large (C = 16), flips do not decide what this row scores.
        "kbop_unit": Method("KBOP from random signs, scales from 1", Body("binary", "unit"), FLIP_RATES[1:2]),
        # Only by --methods: what separates start, rule and activation.
        "ste_init": Method("STE, scales of BNN Init", Body("latent", "bnn_init"), LATENT_RATES),
        "kbop_torch": Method("KBOP from torch's start, sign × mean", Body("binary", "torch"), FLIP_RATES),
        "kbop_react": Method("KBOP, BNN Init, ReActNet's shifts", Body("binary", "bnn_init", shifts=True), FLIP_RATES),
    }
)
#: Not trained: the full-precision network of the same seed, binarized after its training.
PLAIN = "plain"
LABELS = {PLAIN: "plain sign × mean, not retrained"} | {key: method.label for key, method in METHODS.items()}
DEFAULT = ("full", "ste", "react", "kbop", "kbop_unit")
#: Binary ways of others; the best of them by mean test PSNR is the peer of the claims.
PEERS = (PLAIN, "ste", "react", "ste_init")
FULL, OURS = "full", "kbop"
