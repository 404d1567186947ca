"""Owns how many floating-point operations a training step needs, and what a GPU could do in the same time.

Model FLOPs utilization (PaLM, arXiv:2204.02311, appendix B) counts what the mathematics needs, not what was computed:
for each token 6 operations a parameter for the student's forward and backward pass, 2 for the teacher's forward pass
when it runs, and 12·T·width a layer for attention's forward and backward pass (4 for the teacher's). Recomputed
activations and unpacked signs do not count.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Dense bfloat16 operations a second by GPU, from the vendors' data sheets; the first name whose words are in the
#: device's own name counts.
PEAK_BF16 = {
    "B200": 2.25e15,
    "GH200": 989.4e12,
    "H200 NVL": 835.5e12,
    "H200": 989.4e12,
    "H100 NVL": 835.5e12,
    "H100 PCIe": 756.5e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362.05e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}
#: Words that tell a GPU, or a part of one, from its namesake in the table.
OTHER_MODELS = ("Ti", "D", "Laptop", "MIG")


@dataclass(frozen=True)
class ModelSize:
    """What the operations of a step follow from.

    Attributes:
        parameters: of the model, embedding tables that are only looked up left out.
        layers: decoder blocks.
        width: of the hidden state.
    """

    parameters: int
    layers: int
    width: int


def flops_per_token(size: ModelSize, context: int, live_teacher: bool) -> float:
    """Operations a token of training needs.

    Args:
        size: of student and teacher, which are equal.
        context: tokens in a window, T.
        live_teacher: whether a teacher runs beside the student.
    """
    passes = 8 if live_teacher else 6
    return passes * size.parameters + 2 * passes * size.layers * context * size.width


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 operations a second of a GPU, by the name its driver gives; None for one not in the table."""
    words = f" {device_name.replace('-', ' ')} "  # whole words: an L40 is no L4, an A1000 no A100
    if any(f" {word} " in words for word in OTHER_MODELS):
        return None
    return next((peak for name, peak in PEAK_BF16.items() if f" {name} " in words), None)
