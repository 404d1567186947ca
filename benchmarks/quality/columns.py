"""Owns column scales beside the group scales, as a knob: ŵ_ij = α_ig s_ij |c_j|, c trained at the scales' rate.

Refuses to know flip rules. `own`: each layer has a c, as OneBit's have; it is stored, and formats with scales of
rows or groups cannot hold it. `shared`: layers that read one tensor (q, k, v; gate, up) share one, and `fold` moves it
into what gives that tensor: the weight and bias of a norm, or the scales of the rows of an earlier layer (v before
o, up before down, fc1 before fc2). Then nothing of it is stored and every format holds the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kbop_core.layers import BinaryLinear

Kind = Literal["own", "shared"]
#: Last name of a layer → of the layer of the same block whose rows are its columns: averaged by the attention,
#: multiplied by a gate, or (fc1, fc2) passed through ReLU, all of which a positive factor passes.
GIVERS = {"o_proj": "v_proj", "out_proj": "v_proj", "down_proj": "up_proj", "fc2": "fc1"}


class ColumnScales:
    """The column scales of a binary student; building it puts them in front of its layers.

    Args:
        model: the student; each c becomes a parameter `column_scale` of its layers.
        layers: name → its binary layers.
        kind: "own" or "shared".
        ids_BT: token ids of one forward pass, which shows who reads and who gives each tensor.

    Raises:
        ValueError: "shared", and what gives a layer's input is neither a norm nor in GIVERS, or another activation
            than ReLU comes between.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, BinaryLinear], kind: Kind, ids_BT: Tensor) -> None:
        self.givers: list[tuple[nn.Module, nn.Parameter]] = []
        if kind == "own":
            for layer in layers.values():
                ones = torch.ones(layer.in_features, device=layer.weight_scale.device)
                _multiply_input(layer, nn.Parameter(ones), layer.in_features)
            return
        config: Any = model.config
        activation = getattr(config, "activation_function", None) or getattr(config, "hidden_act", None)
        if activation != "relu" and any(n.endswith(".fc2") for n in layers):
            raise ValueError(f"{activation} does not pass a factor from fc1 to fc2; use `own` columns")
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shared: dict[nn.Module, nn.Parameter] = {}
        for name, giver in _givers(model, layers, ids_BT).items():
            if giver not in shared:
                shared[giver] = nn.Parameter(torch.ones(len(_given(giver)), device=_given(giver).device))
                self.givers.append((giver, shared[giver]))
            _multiply_input(layers[name], shared[giver], head)

    @torch.no_grad()
    def fold(self) -> None:
        """Move the shared scales into what gives each tensor; the student computes what it did before."""
        for giver, parameter in self.givers:
            scale = parameter.abs()
            given = _given(giver)
            given.mul_(scale.view(-1, *[1] * (given.dim() - 1)))
            bias = getattr(giver, "bias", None)
            if isinstance(bias, Tensor):
                bias.mul_(scale)
            parameter.fill_(1.0)


def _given(giver: nn.Module) -> Tensor:
    """What multiplies the outputs of a norm, (I,), or of a binary layer, (O, G)."""
    return giver.weight_scale if isinstance(giver, BinaryLinear) else giver.get_parameter("weight")


def _multiply_input(layer: BinaryLinear, scale: nn.Parameter, head: int) -> None:
    """x ← |c| ⊙ x. Where query heads share values, c has one entry a value: each head of them is repeated."""
    layer.column_scale = scale
    repeats = layer.in_features // len(scale)

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        spread = scale.abs().view(-1, 1, head).expand(-1, repeats, -1).reshape(-1) if repeats > 1 else scale.abs()
        return args[0] * spread

    layer.register_forward_pre_hook(hook)


def _givers(model: nn.Module, layers: Mapping[str, BinaryLinear], ids_BT: Tensor) -> dict[str, nn.Module]:
    """Layer → the norm whose output it reads, or else the layer of its block named in GIVERS."""
    outputs: list[tuple[Tensor, nn.Module]] = []  # kept alive, so that no address is used twice
    found: dict[str, nn.Module] = {}

    def give(module: nn.Module, _: Any, output: Any) -> None:
        outputs.append((output, module))

    def read(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            norm = next((m for tensor, m in outputs if tensor.data_ptr() == args[0].data_ptr()), None)
            found[name] = norm if norm is not None else _earlier(name, layers)

        return hook

    weights = [(m, getattr(m, "weight", None)) for m in model.modules()]
    norms = [m for m, weight in weights if isinstance(weight, nn.Parameter) and weight.dim() == 1]
    handles = [m.register_forward_hook(give) for m in norms]
    handles += [layer.register_forward_pre_hook(read(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            model(input_ids=ids_BT, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _earlier(name: str, layers: Mapping[str, BinaryLinear]) -> BinaryLinear:
    parent, _, last = name.rpartition(".")
    giver = layers.get(f"{parent}.{GIVERS.get(last)}")
    if giver is None:
        raise ValueError(f"{name} reads neither a norm's output nor that of a layer in {sorted(GIVERS)}")
    return giver
