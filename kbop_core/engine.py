"""Owns the DeepSpeed engine: full-precision parameters, their gradients over ranks, their optimizer and its state.

The only module that imports deepspeed. Refuses binary weights: bits are buffers that DeepSpeed never sees as
parameters, because it would keep a 4-byte master copy of each, which is a latent weight.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from kbop_core.errors import NonFiniteGradient
from kbop_core.fragments import Fragments
from kbop_core.lazy import blocks_on_disk, keep
from kbop_core.shard import Gang
from kbop_core.slices import Slice, SliceReader

#: Elements that ZeRO reduces or gathers at once: 64 MiB in bfloat16. Its default holds 1 GB, however small the model.
BUCKET = 2**25
_BUCKETS = ("reduce_bucket_size", "allgather_bucket_size")


@dataclass(frozen=True)
class EngineConfig:
    """What DeepSpeed is told.

    Attributes:
        micro_batch: windows a rank handles in one micro-step.
        micro_steps: micro-steps accumulated into one step.
        zero_stage: what of the full-precision side is sharded over ranks: 0 nothing, 1 the optimizer, 2 gradients too,
            3 parameters too.
        bf16: parameters and activations in bfloat16 (GPUs); float32 otherwise.
        clip: largest norm of the full-precision gradients of a step; 0 turns it off.
    """

    micro_batch: int
    micro_steps: int
    zero_stage: int = 1
    bf16: bool = False
    clip: float = 1.0

    def to_deepspeed(self) -> dict[str, Any]:
        """The engine's configuration file as a dictionary."""
        return {
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": self.micro_steps,
            "gradient_clipping": self.clip,
            "zero_optimization": {"stage": self.zero_stage} | dict.fromkeys(_BUCKETS, BUCKET),
            "bf16": {"enabled": self.bf16},
            "steps_per_print": 10**9,
        }


@contextmanager
def gang_of_ranks(device: str, timeout_s: float) -> Iterator[Gang]:
    """Join the ranks named by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; leave them at the end of the block.

    Args:
        device: "cpu" (gloo) or "cuda" (NCCL).
        timeout_s: after which a collective that hangs is an error, seconds.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device == "cpu":
        # Its first use compiles C++ for minutes and leaks shared memory; gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    deepspeed.init_distributed(
        dist_backend={"cpu": "gloo", "cuda": "nccl"}[device], timeout=timedelta(seconds=timeout_s), verbose=False
    )
    limit_collectives(timeout_s)
    try:
        yield Gang(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def barrier(gang: Gang) -> None:
    """Wait for every rank."""
    if gang.size > 1:
        dist.barrier(group=gang.group)


def limit_collectives(timeout_s: float) -> None:
    """From now on, a collective of any group that hangs this long is an error, seconds.

    To be called again when a stage begins that waits longer or less, and after DeepSpeed made groups of its own.
    """
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def _skip_unused_compilation() -> None:
    """Keep DeepSpeed from compiling an optimizer nobody uses here: 6 s or more in every rank, at each start.

    ZeRO imports its Muon only to ask whether an optimizer is one; a module with an empty class answers no.
    """
    name = "deepspeed.runtime.zero.muon.muon_optimizer"
    stub = types.ModuleType(name)
    stub.MuonWithAuxAdam = type("MuonWithAuxAdam", (), {})  # type: ignore[attr-defined]
    sys.modules.setdefault(name, stub)


def share_frozen(model: nn.Module) -> Callable[..., Any]:
    """A frozen model whose parameters are divided over the ranks (ZeRO stage 3) and gathered a layer at a time.

    Every rank must call it equally often. The model itself is changed: blocks that are on disk (lazy.py) are loaded
    and divided one after the other, so that no rank ever holds more than one of them whole.
    """
    _skip_unused_compilation()
    half = next(model.parameters()).dtype == torch.bfloat16
    config = EngineConfig(1, 1, zero_stage=3, bf16=half, clip=0.0).to_deepspeed()
    for block in blocks_on_disk(model):
        keep(model, block)
        deepspeed.zero.Init(module=model.get_submodule(block), config_dict_or_path=config)
    shared: Callable[..., Any]
    shared, *_ = deepspeed.initialize(model=model, config=config, dist_init_required=False)
    return shared


class Engine:
    """The full-precision side of one training run.

    Args:
        model: the student; its parameters that require gradients are trained.
        groups: AdamW parameter groups; `lr` of each is its peak.
        config: see EngineConfig.
        gang: the ranks.
        timeout_s: of the collectives of groups that DeepSpeed makes, seconds.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[dict[str, Any]],
        config: EngineConfig,
        gang: Gang,
        timeout_s: float,
    ) -> None:
        _skip_unused_compilation()
        self._peaks = [float(group["lr"]) for group in groups]
        optimizer = torch.optim.AdamW(list(groups), betas=(0.9, 0.95), weight_decay=0.0)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config.to_deepspeed(), dist_init_required=False
        )
        optimizer.state.clear()  # at stage 0 in bfloat16 DeepSpeed has made a step of zeros, which AdamW would count
        limit_collectives(timeout_s)
        trained = {n: p for n, p in self._engine.module.named_parameters() if p.requires_grad}
        self._fragments = Fragments(self._engine.optimizer, trained, gang)

    @property
    def group(self) -> dist.ProcessGroup:
        """DeepSpeed's own data-parallel group, for KBOP's collectives too: with two communicators NCCL can deadlock."""
        group: dist.ProcessGroup = self._engine.data_parallel_group
        return group

    def __call__(self, ids_BT: Tensor) -> Tensor:
        """The student's logits (B, T, V)."""
        logits: Tensor = self._engine(input_ids=ids_BT, use_cache=False).logits
        return logits

    def backward(self, loss: Tensor) -> None:
        """Backward of one micro-step; the loss is divided by the number of micro-steps first."""
        self._engine.backward(loss)

    def step(self) -> None:
        """End a micro-step: at the last one of a step, update the parameters and forget the gradients.

        Raises:
            NonFiniteGradient: the gradients' norm is not finite. Parameters in memory may be spoiled, checkpoints not.
        """
        boundary = self._engine.is_gradient_accumulation_boundary()
        norm = None
        if boundary and self._engine.zero_optimization_stage() == 0:  # in float32 it tells no norm itself
            norm = torch.nn.utils.get_total_norm(
                [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            )
        self._engine.step()
        if boundary and norm is None:
            norm = self._engine.get_global_grad_norm()
        if norm is not None and not math.isfinite(float(norm)):
            raise NonFiniteGradient(
                f"the gradient of the full-precision parameters has norm {float(norm)}",
                "resume from the last checkpoint with smaller learning rates",
            )

    def set_learning_rates(self, factor: float) -> None:
        """Each group's peak times `factor`, for the coming step."""
        for group, peak in zip(self._engine.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = factor * peak

    def state(self) -> dict[str, Slice]:
        """This rank's part of the parameters' float32 values and AdamW's moments, aliased."""
        return self._fragments.state()

    def load(self, saved: SliceReader, steps_done: int) -> None:
        """Take back what any number of ranks saved, with any ZeRO stage; every rank calls.

        Raises:
            BadCheckpoint: not this model's parameters.
        """
        self._fragments.load(saved, steps_done)

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Within the block every rank has every parameter whole, to be read; every rank enters it."""
        parameters = list(self._engine.module.parameters())
        with deepspeed.zero.GatheredParameters(parameters, enabled=self._engine.zero_optimization_stage() == 3):
            yield

    def close(self) -> None:
        """Let go of DeepSpeed's hooks and buffers."""
        self._engine.destroy()
