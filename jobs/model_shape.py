"""Owns the sizes of a model: which tensors it has, which of them become binary, as numbers only.

Refuses to load weights and to guess: sizes come from config.json and, where there are files, from safetensors headers,
which are exact; a family whose blocks are not known here is an error, not an estimate.

Letters: D hidden size, F width of the MLP, V vocabulary, O and I out- and in-features of a linear layer.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

from jobs.errors import UnknownModel, UnknownShape
from jobs.json_files import read_json
from jobs.safetensors_header import tensor_shapes
from jobs.sources import ModelSource

Family = Literal["llama", "gpt2", "opt"]
#: `model_type` of config.json → the family whose blocks it has.
FAMILIES: dict[str, Family] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "qwen3": "llama",
    "gpt2": "gpt2",
    "opt": "opt",
}
#: Rows of OPT's table of positions before that of the first token.
OPT_OFFSET = 2
#: A tensor inside a decoder block: the number of the block, then the name inside it.
_IN_BLOCK = re.compile(r"(?:.*\.)?(?:layers|h)\.(\d+)\.(.+)\.(weight|bias)")
_HEADS = ("lm_head.weight",)


@dataclass(frozen=True)
class Linear:
    """One linear layer of a decoder block: dotted name, O, I."""

    name: str
    out_features: int
    in_features: int

    @property
    def weights(self) -> int:
        """O·I."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class ModelShape:
    """The sizes of one model.

    Attributes:
        name: how a reader knows it.
        family: what its blocks look like.
        blocks: number of decoder blocks.
        hidden, heads, kv_heads, head_dim, ffn, vocabulary: as in config.json; vocabulary is that of the embedding.
        qk_norm: whether queries and keys are normalised per head (Qwen3).
        linears: the linear layers of all blocks, in order.
        embedding: weights of the token embedding, and of positions where they are learned.
        head: weights of the head; 0 where it is the embedding.
        rest: norms, and biases of any layer.
        longest: the model's own longest window, tokens; None where the config does not say.
        exact: whether the sizes were read from the weight files, not derived from the config.
    """

    name: str
    family: Family
    blocks: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    qk_norm: bool
    linears: tuple[Linear, ...]
    embedding: int
    head: int
    rest: int
    longest: int | None = None
    exact: bool = False

    @property
    def parameters(self) -> int:
        """All of them, a shared embedding counted once."""
        return sum(la.weights for la in self.linears) + self.embedding + self.head + self.rest

    def binary(self, keep: Sequence[str] = ()) -> tuple[Linear, ...]:
        """The linear layers that become binary; `keep` are names or shell patterns of those that stay."""
        return tuple(la for la in self.linears if not any(fnmatch.fnmatchcase(la.name, p) for p in keep))


def shape_of_folder(folder: Path, name: str) -> ModelShape:
    """The sizes of a model on this disk: from its config, then from its weight files where it has any.

    Raises:
        UnknownModel: no config.json.
        UnknownShape: a family that is not known here, or a size the config lacks.
        BadWeights: a weight file whose header is not sound.
    """
    config = read_json(folder / "config.json")
    if config is None:
        raise UnknownModel(f"{name!r} has no readable config.json", "a model is a folder in Hugging Face form")
    shape = shape_of_config(config, name)
    tensors: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= tensor_shapes(file)
    return _with_exact_sizes(shape, tensors) if tensors else shape


def shape_of_source(source: ModelSource, name: str) -> ModelShape:
    """`shape_of_folder` of a model that is on this disk.

    Raises:
        UnknownModel: a hub id, whose files are not here.
        UnknownShape, BadWeights: as shape_of_folder.
    """
    if source.kind == "hub":
        raise UnknownModel(f"{name!r} is on the hub, and plan reads only files", "download its config.json to a folder")
    return shape_of_folder(Path(source.location), name)


def shape_of_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """The sizes that a config.json implies.

    Raises:
        UnknownShape: a family that is not known here, or a size the config lacks.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise UnknownShape(
            f"{name!r} is of model_type {config.get('model_type')!r}, whose blocks plan does not know",
            f"known: {', '.join(FAMILIES)}",
        )
    make = {"llama": _llama, "gpt2": _gpt2, "opt": _opt}[family]
    return make(_Sizes(config, name))


class _Sizes:
    """Reads whole numbers from a config, and complains about those it lacks."""

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self.config, self.name = config, name

    def __call__(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or value < 1:
            raise UnknownShape(
                f"config.json of {self.name!r} says {key} = {value!r}", f"{key} must be a whole number of 1 or more"
            )
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        return bool(self.config.get(key, default))


def _llama(read: _Sizes) -> ModelShape:
    kind = read.config["model_type"]
    hidden, ffn, blocks, vocabulary = (
        read(k) for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    )
    heads = read("num_attention_heads")
    kv_heads = read("num_key_value_heads", heads)
    width = read("head_dim", hidden // heads)
    queries, keys = heads * width, kv_heads * width
    sizes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    attention_bias = kind == "qwen2" or read.flag("attention_bias")
    biases = (queries + 2 * keys + (0 if kind == "qwen2" else hidden)) if attention_bias else 0
    biases += 2 * ffn + hidden if read.flag("mlp_bias") else 0
    qk_norm = kind == "qwen3"
    norms = 2 * hidden + (2 * width if qk_norm else 0)
    embedding = vocabulary * hidden
    return ModelShape(
        name=read.name,
        family="llama",
        blocks=blocks,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width,
        ffn=ffn,
        vocabulary=vocabulary,
        qk_norm=qk_norm,
        linears=_repeat("model.layers", blocks, sizes),
        embedding=embedding,
        head=0 if read.flag("tie_word_embeddings") else embedding,
        rest=blocks * (norms + biases) + hidden,
        longest=read("max_position_embeddings") if "max_position_embeddings" in read.config else None,
    )


def _gpt2(read: _Sizes) -> ModelShape:
    hidden, blocks, heads = (read(k) for k in ("n_embd", "n_layer", "n_head"))
    ffn = read("n_inner", 4 * hidden)
    sizes = {
        "attn.c_attn": (3 * hidden, hidden),
        "attn.c_proj": (hidden, hidden),
        "mlp.c_fc": (ffn, hidden),
        "mlp.c_proj": (hidden, ffn),
    }
    linears = _repeat("transformer.h", blocks, sizes)
    return _with_biases(read, "gpt2", heads, ffn, linears, read("n_positions", 1024), tied=True)


def _opt(read: _Sizes) -> ModelShape:
    hidden, blocks, heads = (read(k) for k in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    ffn = read("ffn_dim")
    if read("word_embed_proj_dim", hidden) != hidden or not read.flag("do_layer_norm_before", True):
        raise UnknownShape(f"{read.name!r} is an OPT with projected embeddings or norms last", "plan knows the others")
    sizes = {f"self_attn.{name}": (hidden, hidden) for name in ("k_proj", "v_proj", "q_proj", "out_proj")}
    sizes |= {"fc1": (ffn, hidden), "fc2": (hidden, ffn)}
    linears = _repeat("model.decoder.layers", blocks, sizes)
    positions = read("max_position_embeddings") + OPT_OFFSET
    tied = read.flag("tie_word_embeddings", True)
    return _with_biases(read, "opt", heads, ffn, linears, positions, tied=tied)


def _with_biases(
    read: _Sizes, family: Family, heads: int, ffn: int, linears: tuple[Linear, ...], positions: int, *, tied: bool
) -> ModelShape:
    """GPT-2 and OPT: LayerNorms of two vectors, a bias in every linear layer, learned positions."""
    vocabulary, hidden = read("vocab_size"), linears[0].in_features
    blocks = read("n_layer" if family == "gpt2" else "num_hidden_layers")
    return ModelShape(
        name=read.name,
        family=family,
        blocks=blocks,
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=ffn,
        vocabulary=vocabulary,
        qk_norm=False,
        linears=linears,
        embedding=(vocabulary + positions) * hidden,
        head=0 if tied else vocabulary * hidden,
        rest=blocks * 4 * hidden + sum(la.out_features for la in linears) + 2 * hidden,
        longest=positions if family == "gpt2" else positions - OPT_OFFSET,
    )


def _repeat(prefix: str, blocks: int, sizes: Mapping[str, tuple[int, int]]) -> tuple[Linear, ...]:
    return tuple(Linear(f"{prefix}.{number}.{name}", *size) for number in range(blocks) for name, size in sizes.items())


def _with_exact_sizes(shape: ModelShape, tensors: Mapping[str, tuple[int, ...]]) -> ModelShape:
    """The same model with the sizes its files declare."""
    linears, embedding, head, rest = [], 0, 0, 0
    for name, size in tensors.items():
        match = _IN_BLOCK.fullmatch(name)
        if match and len(size) == 2:
            wide, narrow = reversed(size) if shape.family == "gpt2" else size  # Conv1D stores (I, O)
            linears.append(Linear(name.removesuffix(".weight"), wide, narrow))
        elif len(size) == 2 and name.endswith(_HEADS):
            head += prod(size) if shape.head else 0
        elif len(size) == 2 and not match:
            embedding += prod(size)
        elif len(size) == 1:
            rest += prod(size)
    wanted = {la.weights for la in shape.linears}
    if len(linears) != len(shape.linears) or {la.weights for la in linears} != wanted:
        raise UnknownShape(
            f"the weight files of {shape.name!r} hold {len(linears)} linear layers in blocks of other sizes than "
            f"config.json implies ({len(shape.linears)} layers)",
            "copy config.json and the weights of one and the same model",
        )
    return replace(shape, linears=tuple(linears), embedding=embedding, head=head, rest=rest, exact=True)
