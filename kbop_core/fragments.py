"""Owns where the full-precision side lies on a rank: for each parameter, the piece whose master copy is here.

DeepSpeed keeps float32 copies and AdamW's moments as flat partitions whose layout depends on the ZeRO stage and the
number of ranks. Here each becomes ranges of the parameters that they stand for, by name, so that a checkpoint of any
stage and any number of ranks can be read by any other. Refuses to import DeepSpeed: it is given its optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kbop_core.errors import BadCheckpoint
from kbop_core.shard import Gang
from kbop_core.slices import Slice, SliceReader

#: What AdamW remembers of a parameter, in the shape of the parameter.
ADAMW_MOMENTS = ("exp_avg", "exp_avg_sq")
#: What the names of these tensors in a checkpoint begin with.
VALUE_PREFIX = "parameter"


@dataclass(frozen=True)
class _Fragment:
    """Elements start … start+length−1 of a flattened parameter, at `offset` of what the optimizer updates."""

    holder: Tensor
    offset: int
    start: int
    length: int

    def of(self, flat: Tensor) -> Tensor:
        """This piece of a tensor that is laid out like the holder; aliased."""
        return flat.detach().view(-1)[self.offset : self.offset + self.length]


class Fragments:
    """The pieces of one rank.

    Args:
        optimizer: DeepSpeed's, or AdamW itself with ZeRO stage 0 in float32.
        parameters: name → parameter of the student, those that train.
        gang: the ranks.
    """

    def __init__(self, optimizer: Any, parameters: dict[str, nn.Parameter], gang: Gang) -> None:
        self._optimizer, self._parameters, self._gang = optimizer, parameters, gang
        self._adamw: torch.optim.AdamW = getattr(optimizer, "optimizer", optimizer)

    def state(self) -> dict[str, Slice]:
        """Values and moments of this rank's pieces, float32, aliased; what every rank has is divided between them."""
        found = {}
        for name, parameter in self._parameters.items():
            for piece in self._to_write(parameter):
                moments = self._adamw.state.get(piece.holder, {})
                tensors = {VALUE_PREFIX: piece.holder} | {key: moments[key] for key in ADAMW_MOMENTS if key in moments}
                for key, tensor in tensors.items():
                    found[f"{key}.{name}"] = Slice(piece.of(tensor), piece.start, parameter_size(parameter))
        return found

    @torch.no_grad()
    def load(self, saved: SliceReader, steps_done: int) -> None:
        """Take back what any number of ranks saved with any ZeRO stage.

        Raises:
            BadCheckpoint: a parameter is missing or of another size.
        """
        for name, parameter in self._parameters.items():
            if f"{VALUE_PREFIX}.{name}" not in saved.names:
                raise BadCheckpoint(f"no value of {name} was saved", "resume with the model that the run began with")
            if saved.total(f"{VALUE_PREFIX}.{name}") != parameter_size(parameter):
                raise BadCheckpoint(f"{name} has another size", "resume with the model that the run began with")
            for piece in self._pieces(parameter):
                self._load_piece(saved, name, piece, steps_done)
            self._set_working_copy(parameter, saved.read_whole(f"{VALUE_PREFIX}.{name}"))

    def _load_piece(self, saved: SliceReader, name: str, piece: _Fragment, steps_done: int) -> None:
        stop = piece.start + piece.length
        piece.of(piece.holder).copy_(saved.read(f"{VALUE_PREFIX}.{name}", piece.start, stop))
        if f"{ADAMW_MOMENTS[0]}.{name}" not in saved.names:
            return  # saved before the first step
        moments = self._adamw.state[piece.holder]
        moments["step"] = torch.tensor(float(steps_done))
        for key in ADAMW_MOMENTS:
            if key not in moments:
                moments[key] = torch.zeros_like(piece.holder)
            piece.of(moments[key]).copy_(saved.read(f"{key}.{name}", piece.start, stop))

    def _set_working_copy(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """The parameter that the model computes with, from its float32 master."""
        if not hasattr(parameter, "ds_tensor"):
            parameter.data.copy_(whole.view(parameter.shape))
            return
        for piece in self._pieces(parameter):
            parameter.ds_tensor.data.view(-1)[: piece.length].copy_(whole[piece.start : piece.start + piece.length])
        if parameter.numel() == whole.numel():  # small ones stay whole on every rank
            parameter.data.copy_(whole.view(parameter.shape))

    def _to_write(self, parameter: nn.Parameter) -> Iterator[_Fragment]:
        """Pieces that this rank writes: its own, or its share of what all have."""
        for piece in self._pieces(parameter):
            if piece.length < parameter_size(parameter) or self._gang.size == 1 or not self._on_all_ranks(parameter):
                yield piece
            elif (share := self._gang.rows(piece.length)).stop > share.start:
                yield _Fragment(piece.holder, piece.offset + share.start, share.start, share.stop - share.start)

    def _on_all_ranks(self, parameter: nn.Parameter) -> bool:
        return not hasattr(parameter, "ds_tensor") and not hasattr(parameter, "_hp_mapping")

    def _pieces(self, parameter: nn.Parameter) -> list[_Fragment]:
        """Where a parameter's master copy is on this rank; none when it is wholly on others."""
        if hasattr(parameter, "ds_tensor"):
            return self._of_stage_3(parameter)
        if hasattr(parameter, "_hp_mapping"):
            return self._of_stage_1_or_2(parameter)
        return [_Fragment(self._of_stage_0(parameter), 0, 0, parameter.numel())]

    def _of_stage_0(self, parameter: nn.Parameter) -> Tensor:
        """The parameter itself, or the float32 copy of a bfloat16 one."""
        if self._optimizer is self._adamw:
            return parameter
        for halves, singles in zip(self._optimizer.fp16_groups, self._optimizer.fp32_groups, strict=True):
            for half, single in zip(halves, singles, strict=True):
                if half is parameter:
                    return single  # type: ignore[no-any-return]
        raise RuntimeError("a parameter that trains is not in the optimizer")

    def _of_stage_1_or_2(self, parameter: Any) -> list[_Fragment]:
        mapping = parameter._hp_mapping
        if mapping is None:
            return []
        holder = self._optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
        return [_Fragment(holder, high.start, low.start, low.numel)]

    def _of_stage_3(self, parameter: Any) -> list[_Fragment]:
        group, offset, length = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        start = min(self._gang.rank * length, parameter.ds_numel)
        length = min(length, parameter.ds_numel - start)  # the last rank's end is padding
        holder = self._optimizer.fp32_partitioned_groups_flat[group]
        return [_Fragment(holder, int(offset), start, length)] if length > 0 else []


def parameter_size(parameter: Any) -> int:
    """Elements of the whole parameter, also when ZeRO stage 3 has left only this rank's partition in memory."""
    return int(getattr(parameter, "ds_numel", None) or parameter.numel())
