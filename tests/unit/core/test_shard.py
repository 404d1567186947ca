"""Who holds which rows; the collectives of one rank. Several ranks: tests/distributed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kbop_core.schedules import FlipSchedule
from kbop_core.shard import Gang


@given(total=st.integers(0, 300), size=st.integers(1, 17))
def test_every_row_has_exactly_one_owner(total: int, size: int) -> None:
    slices = [Gang(rank, size).rows(total) for rank in range(size)]
    assert [row for s in slices for row in range(s.start, s.stop)] == list(range(total))


@given(total=st.integers(0, 300), size=st.integers(1, 17))
def test_no_rank_holds_more_than_a_block(total: int, size: int) -> None:
    gangs = [Gang(rank, size) for rank in range(size)]
    assert all(g.rows(total).stop - g.rows(total).start <= g.block(total) for g in gangs)
    assert gangs[0].block(total) * size >= total


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
def test_at_one_rank_no_gradient_is_rounded_to_the_wire(wire: torch.dtype) -> None:
    fine = torch.full((3, 2), 1 + 2.0**-20)
    assert Gang().wire == torch.bfloat16
    assert torch.equal(Gang(wire=wire).reduce_scatter_rows(fine)(), fine)


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (5, 9)])
def test_one_rank_gets_back_what_it_gives(shape: tuple[int, int]) -> None:
    gang, tensor = Gang(), torch.randn(shape)
    assert gang.reduce_scatter_rows(tensor)() is tensor
    assert gang.all_gather(tensor)[0] is tensor
    assert gang.gather_rows([tensor], [shape[0]])[0] is tensor
    assert gang.sum(tensor) is tensor
    assert gang.max(tensor) is tensor


def test_at_one_rank_the_dtype_of_the_wire_changes_no_flip_and_no_state(learner: Callable) -> None:
    wires = [Gang(wire=wire) for wire in (torch.bfloat16, torch.float32)]
    rough, fine = (learner(5, 40, FlipSchedule(0.1, 6, 1), gang=gang) for gang in wires)
    for gradient in torch.randn(6, 5, 40, generator=torch.Generator().manual_seed(0)):
        assert rough.step(gradient).flips == fine.step(gradient).flips != {"a": 0}
    held = rough.kbop.state()
    assert all(torch.equal(held[name].rows, piece.rows) for name, piece in fine.kbop.state().items())
