"""Owns which modules of a model become binary, which stay and why. Refuses to choose signs or scales (init/).

The plan is explicit: it names every linear layer of the decoder blocks on one of its two sides. Embeddings, norms and
the head lie outside the blocks and stay as they are, so tied heads stay tied. GPT-2's `Conv1D` (weight stored as
(I, O)) is a linear layer like any other. Nothing here imports transformers: models are recognised by structure.
"""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kbop_core.errors import BadWeights, NothingToBinarize, UnsupportedModel
from kbop_core.layers import BinaryLinear, group_count
from kbop_core.lazy import blocks_on_disk, keep, resident

#: Last part of the name of small linears that pick experts; a wrong expert costs far more than their few bits save.
ROUTER_NAMES = frozenset({"gate", "router"})


@dataclass(frozen=True)
class BinaryEntry:
    """One layer that becomes binary.

    Attributes:
        name: dotted module name.
        out_features, in_features: O and I.
        groups: scales per row.
        bias: whether it has one (it stays in full precision).
    """

    name: str
    out_features: int
    in_features: int
    groups: int
    bias: bool


@dataclass(frozen=True)
class KeptEntry:
    """One linear layer that stays, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class ConversionPlan:
    """What conversion does to one model.

    Attributes:
        group_size: weights that share a scale where it divides the width; other rows have one scale.
        blocks: names of the decoder blocks in forward order.
        binary: layers that become binary, in module order.
        kept: linear layers that stay.
    """

    group_size: int
    blocks: tuple[str, ...]
    binary: tuple[BinaryEntry, ...]
    kept: tuple[KeptEntry, ...]

    @property
    def weights(self) -> int:
        """Number of binary weights."""
        return sum(e.out_features * e.in_features for e in self.binary)

    @property
    def scales(self) -> int:
        """Number of scales."""
        return sum(e.out_features * e.groups for e in self.binary)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for reports."""
        return asdict(self)


def plan_conversion(model: nn.Module, group_size: int, keep: Sequence[str] = ()) -> ConversionPlan:
    """Decide for every linear layer of `model`; changes nothing.

    Args:
        model: a causal language model with decoder blocks.
        group_size: weights of a row that share a scale, ≥ 1.
        keep: names or shell patterns of modules that stay.

    Raises:
        NothingToBinarize: no decoder blocks, or no linear layer left in them.
        UnsupportedModel: a weight shared by two layers, or a pattern in `keep` that matches nothing.
    """
    if group_size < 1:
        raise ValueError(f"group_size is {group_size}; legal: 1 or more")
    blocks = decoder_blocks(model)
    linears = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if _is_linear(m)]
    unused = [p for p in keep if not any(fnmatch.fnmatchcase(n, p) for n, _ in linears)]
    if unused:
        raise UnsupportedModel(
            f"keep names no linear layer: {', '.join(unused)}", "use names as in model.named_modules()"
        )
    binary, kept = [], []
    users: defaultdict[int, list[str]] = defaultdict(list)
    for name, module in linears:
        users[id(module.weight)].append(name)
    for name, module in linears:
        reason = _reason_to_stay(name, blocks, keep)
        if reason:
            kept.append(KeptEntry(name, reason))
            continue
        if len(sharing := users[id(module.weight)]) > 1:
            raise UnsupportedModel(f"{' and '.join(sharing)} share one weight", "keep all of them with `keep`")
        out_features, in_features = linear_shape(module)
        groups = group_count(in_features, group_size)
        binary.append(BinaryEntry(name, out_features, in_features, groups, getattr(module, "bias", None) is not None))
    if not binary:
        raise NothingToBinarize(
            f"{type(model).__name__} has no linear layer to binarize in its decoder blocks ({len(kept)} kept)",
            "KBOP binarizes Linear and GPT-2 Conv1D layers inside decoder blocks; check the architecture and `keep`",
        )
    return ConversionPlan(group_size, blocks, tuple(binary), tuple(kept))


def linear_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer as (O, I), a view of the module's own tensor."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.t() if _is_conv1d(module) else weight


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(O, I) of a linear layer."""
    out_features, in_features = linear_weight(module).shape
    return out_features, in_features


def check_finite(model: nn.Module) -> None:
    """Refuse a model whose weights are not all finite numbers.

    Raises:
        BadWeights: names the first tensor and how many there are.
    """
    bad = _not_finite(model)
    for block in blocks_on_disk(model):
        with resident(model, block):
            bad += [f"{block}.{name}" for name in _not_finite(model.get_submodule(block))]
    if bad:
        raise BadWeights(
            f"NaN or infinity in {len(bad)} tensors of the model, first {bad[0]}",
            "repair or re-download the checkpoint",
        )


def _not_finite(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if not p.is_meta and not bool(torch.isfinite(p).all())]


@torch.no_grad()
def to_binary(model: nn.Module, entry: BinaryEntry, group_size: int, *, trainable: bool) -> BinaryLinear:
    """Replace one linear layer by a binary one with plain values: its signs, and the mean |w| of each group as scales.

    Sign and mean are the least-squares fit when inputs are white (XNOR-Net's scaling, per group).
    """
    old = model.get_submodule(entry.name)
    weight_OI = linear_weight(old).detach().float()
    new = BinaryLinear(
        entry.in_features, entry.out_features, entry.bias, group_size, trainable=trainable, device=weight_OI.device
    )
    new.transposed = _is_conv1d(old)
    new.set_signs(weight_OI)
    new.weight_scale.copy_(weight_OI.reshape(entry.out_features, entry.groups, -1).abs().mean(-1))
    if new.bias is not None:
        new.bias.copy_(old.bias)  # type: ignore[arg-type]
    model.set_submodule(entry.name, new)
    return new


def convert_plain(model: nn.Module, plan: ConversionPlan, *, trainable: bool) -> dict[str, BinaryLinear]:
    """Plain binarization of every layer of the plan, in place: the start of training and the baseline of the report."""
    layers: dict[str, BinaryLinear] = {}
    for block in plan.blocks:
        keep(model, block)
        inside = [e for e in plan.binary if e.name.startswith(block + ".")]
        layers |= {e.name: to_binary(model, e, plan.group_size, trainable=trainable) for e in inside}
    return layers


def binary_layers(model: nn.Module) -> dict[str, BinaryLinear]:
    """Name → layer of every binary layer, in module order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, BinaryLinear)}


def insert_empty(model: nn.Module, names: Sequence[str], group_size: int) -> None:
    """Put untrained binary layers at `names` on the layers' own device (meta while a checkpoint is loaded)."""
    for name in names:
        old = model.get_submodule(name)
        out_features, in_features = linear_shape(old)
        bias = getattr(old, "bias", None) is not None
        device = linear_weight(old).device
        layer = BinaryLinear(in_features, out_features, bias, group_size, device=device)
        layer.transposed = _is_conv1d(old)
        model.set_submodule(name, layer)


def decoder_blocks(model: nn.Module) -> tuple[str, ...]:
    """Names of the decoder blocks: the longest list of modules whose class the model declares as unsplittable.

    Models that declare nothing: the longest `ModuleList` that holds linears.
    """
    declared = set(getattr(model, "_no_split_modules", None) or ())
    candidates = [list(_list_items(name, m)) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    named = [c for c in candidates if c and type(c[0][1]).__name__ in declared]
    with_linears = [c for c in (named or candidates) if any(_is_or_was_linear(m) for _, b in c for m in b.modules())]
    if not with_linears:
        raise NothingToBinarize(
            f"{type(model).__name__} has no list of decoder blocks with linear layers",
            "KBOP binarizes decoder-only transformers; this model's structure is not one",
        )
    return tuple(name for name, _ in max(with_linears, key=len))


def _list_items(name: str, modules: nn.ModuleList) -> Iterator[tuple[str, nn.Module]]:
    for index, module in enumerate(modules):
        yield f"{name}.{index}" if name else str(index), module


def _reason_to_stay(name: str, blocks: Sequence[str], keep: Sequence[str]) -> str | None:
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in keep):
        return "asked for by `keep`"
    if not any(name.startswith(block + ".") for block in blocks):
        return "outside the decoder blocks"
    if name.rsplit(".", 1)[-1] in ROUTER_NAMES:
        return "picks experts"
    return None


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_or_was_linear(module: nn.Module) -> bool:
    return isinstance(module, BinaryLinear) or _is_linear(module)
