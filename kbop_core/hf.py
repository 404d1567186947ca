"""Owns the contact with transformers: loading models and tokenizers, and the plugin that loads packed checkpoints.

Refuses remote code and pickled weights, always. The only module that imports transformers.

`import kbop_core` registers the quantization method "kbop", after which `AutoModelForCausalLM.from_pretrained(folder)`
loads a packed checkpoint as any other. Without the plugin transformers fails loudly, because the packed tensor
is called `weight` and has another shape.
"""

from __future__ import annotations

from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from kbop_core.convert import binary_layers, decoder_blocks, insert_empty
from kbop_core.errors import BadCheckpoint, BadWeights, ModelError, UnsupportedModel
from kbop_core.layers import BinaryLinear
from kbop_core.lazy import ShardedWeights, make_lazy

Model = PreTrainedModel
Tokenizer = PreTrainedTokenizerBase

QUANT_METHOD = "kbop"
#: Versions of the packed format this code reads; the first of them is what it writes.
FORMAT_VERSIONS = (1,)


class KbopConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is not typed strictly
    """`quantization_config` of a packed checkpoint.

    Attributes:
        format_version: version of the packed format.
        group_size: weights of a row that share a scale; a width it does not divide has one scale per row.
        modules: names of the binary layers.
    """

    def __init__(
        self, format_version: int = FORMAT_VERSIONS[0], group_size: int = 128, modules: tuple[str, ...] = (), **_: Any
    ) -> None:
        self.quant_method = QUANT_METHOD
        self.format_version, self.group_size, self.modules = format_version, group_size, list(modules)
        if format_version not in FORMAT_VERSIONS:
            raise BadCheckpoint(
                f"packed format version {format_version}; this code reads {', '.join(map(str, FORMAT_VERSIONS))}",
                "upgrade kbop",
            )


class KbopQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts empty binary layers into the model that transformers is about to fill."""

    requires_calibration = True  # signs come from training; from_pretrained cannot make them

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        insert_empty(model, self.quantization_config.modules, self.quantization_config.group_size)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a saved config names it in words
        for name, layer in binary_layers(model).items():
            model.set_submodule(name, _dense_layer(layer, dtype or torch.float32))
        return model

    def is_serializable(self) -> bool:
        """save_pretrained writes the packed tensors as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed models are for inference; training starts from a job."""
        return False


def _dense_layer(layer: BinaryLinear, dtype: torch.dtype) -> nn.Module:
    """The layer the model had before, with the binary layer's values: Conv1D for GPT-2, which stores (I, O)."""
    weight = layer.dense(dtype)
    if layer.transposed:
        dense: nn.Module = Conv1D(layer.out_features, layer.in_features)
        weight = weight.t().contiguous()
    else:
        dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        dense.bias = layer.bias
    return dense


def register() -> None:
    """Make transformers know "kbop"; doing it twice does nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(KbopConfig)
        register_quantizer(QUANT_METHOD)(KbopQuantizer)


def load_model(location: str, revision: str | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model in eval mode without gradients, from a folder or the hub.

    Args:
        location: folder, or hub id.
        revision: of the hub repository.
        dtype: of the floating-point weights.

    Raises:
        ModelError: anything transformers refuses, with its words.
        BadWeights: a tensor that the configuration wants is missing or has another shape.
    """
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            location,
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except BadCheckpoint:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"cannot load {location}: {error}", "give a decoder-only model that transformers loads from safetensors"
        ) from error
    absent = [*loading["missing_keys"], *(str(m[0]) for m in loading["mismatched_keys"])]
    if absent:  # transformers would go on with random numbers in their place
        raise BadWeights(
            f"{location}: {len(absent)} tensors are missing or not of config.json's shape, first {absent[0]}",
            "repair or re-download the checkpoint",
        )
    return model.eval().requires_grad_(False)


def load_lazily(location: str, revision: str | None, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The same model with its decoder blocks left on disk (lazy.py); a hub model's files are downloaded first.

    Raises:
        ModelError, BadWeights, UnsupportedModel: as load_model, or blocks that cannot be loaded one by one.
    """
    try:
        folder = (
            location
            if Path(location).is_dir()
            else snapshot_download(location, revision=revision, allow_patterns=["model*.safetensors", "*.json"])
        )
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"cannot load {location}: {error}", "give a decoder-only model that transformers loads from safetensors"
        ) from error
    model.eval().requires_grad_(False)
    mapping = get_model_conversion_mapping(model)
    renamings = [r for r in mapping if isinstance(r, WeightRenaming)]
    if getattr(config, "quantization_config", None) or len(renamings) < len(mapping):
        raise UnsupportedModel(
            f"{location}: its files hold {type(model).__name__} in another form, which has to be converted as a whole",
            "load it whole: `offload`: none",
        )

    def rename(name: str) -> str:
        return reduce(lambda found, renaming: str(renaming.rename_source_key(found)[0]), renamings, name)

    weights = ShardedWeights(Path(folder), dtype, device, f"{model.base_model_prefix}.", rename)
    tied = tuple(model._tied_weights_keys or ()) if getattr(config, "tie_word_embeddings", False) else ()
    make_lazy(model, decoder_blocks(model), weights, tied)
    model.tie_weights()
    return model


def load_tokenizer(location: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ModelError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(location, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"no tokenizer at {location}: {error}", "add tokenizer.json to the model's folder") from error


def context_length(model: PreTrainedModel, most: int = 2048) -> int:
    """The model's own context in tokens, at most `most`."""
    return min(int(getattr(model.config, "max_position_embeddings", most)), most)


def source_dtype(model: PreTrainedModel, location: str, revision: str | None = None) -> torch.dtype:
    """The dtype a model's weights have in its own files, as its config says; what it was loaded with otherwise."""
    stated = getattr(AutoConfig.from_pretrained(location, revision=revision, trust_remote_code=False), "dtype", None)
    stated = getattr(torch, stated, None) if isinstance(stated, str) else stated
    return stated if isinstance(stated, torch.dtype) else model.dtype


def vocabulary_size(model: PreTrainedModel) -> int:
    """Token ids the model can read: rows of its embedding."""
    return int(model.get_input_embeddings().weight.shape[0])


def save_metadata(source: str, revision: str | None, folder: Path, quantization: KbopConfig) -> None:
    """Write config.json with the quantization entry, generation config and tokenizer of `source` into `folder`."""
    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    config.quantization_config = quantization.to_dict()
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and "rope_theta" in rope:
        config.rope_theta = rope["rope_theta"]  # some loaders know only the older of the two names
    config.save_pretrained(folder)
    load_tokenizer(source, revision).save_pretrained(folder)
    generation = None
    with suppress(OSError):  # most small models have none
        generation = GenerationConfig.from_pretrained(source, revision=revision)
    if generation is not None:
        generation.save_pretrained(folder)


def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int) -> str:
    """Greedy continuation of a prompt, prompt included."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id or 0)
    return str(tokenizer.decode(out[0], skip_special_tokens=True))
