"""Tensors in pieces on disk: whoever wrote them, any range of rows comes back, or an error says what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kbop_core.checkpoint import write_tensors
from kbop_core.errors import BadCheckpoint
from kbop_core.shard import Gang
from kbop_core.slices import Slice, SliceReader, copy_to_host, write_slices


def write(tensor: Tensor, ranges: Sequence[tuple[int, int]], folder: Path, name: str = "x") -> SliceReader:
    """One file for each range of rows; their order is not that of the ranges."""
    paths = []
    for place, (start, stop) in enumerate(ranges):
        paths.append(folder / f"rank-{len(ranges) - place}.safetensors")
        write_slices({name: Slice(tensor[start:stop], start, tensor.shape[0])}, paths[-1])
    return SliceReader(sorted(paths))


def rows_of(total: int, size: int) -> list[tuple[int, int]]:
    return [(rows.start, rows.stop) for rows in (Gang(rank, size).rows(total) for rank in range(size))]


@pytest.mark.parametrize("writers", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("total", [1, 2, 3, 7, 8])  # fewer rows than ranks, ragged, and even
def test_any_number_of_readers_gets_what_any_number_of_writers_had(writers: int, total: int, tmp_path: Path) -> None:
    tensor = torch.randn(total, 3)
    reader = write(tensor, rows_of(total, writers), tmp_path)
    assert (reader.names, reader.total("x")) == ({"x"}, total)
    for readers in range(1, 6):
        found = [reader.read("x", *rows) for rows in rows_of(total, readers)]
        assert torch.equal(torch.cat(found), tensor)


@given(cuts=st.lists(st.integers(0, 20), max_size=6), ends=st.tuples(st.integers(0, 20), st.integers(0, 20)))
def test_every_range_is_read_back_from_every_split(
    cuts: list[int], ends: tuple[int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    tensor, edges = torch.arange(40).view(20, 2), [0, *sorted(cuts), 20]
    reader = write(tensor, list(pairwise(edges)), tmp_path_factory.mktemp("split"))
    start, stop = sorted(ends)
    assert torch.equal(reader.read("x", start, stop), tensor[start:stop])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6, dtype=torch.uint8).view(3, 2),
        torch.randn(3, 2, 4).bfloat16(),
        torch.randn(3).double(),
        torch.arange(3) - 2**40,
    ],
)
def test_shape_and_dtype_are_kept_also_of_no_rows(tensor: Tensor, tmp_path: Path) -> None:
    reader = write(tensor, [(0, 2), (2, 3)], tmp_path)
    whole, none = reader.read_whole("x"), reader.read("x", 2, 2)
    assert whole.dtype == none.dtype == tensor.dtype
    assert torch.equal(whole, tensor) and none.shape == (0, *tensor.shape[1:])


def test_whole_copies_that_every_rank_wrote_are_read_once(tmp_path: Path) -> None:
    column = torch.randn(5)
    reader = write(column, [(0, 5)] * 3, tmp_path)
    assert torch.equal(reader.read_whole("x"), column)
    assert torch.equal(reader.read("x", 1, 4), column[1:4])


def test_pieces_that_overlap_are_read_without_repeats(tmp_path: Path) -> None:
    tensor = torch.randn(9, 2)
    reader = write(tensor, [(0, 4), (2, 3), (2, 7), (3, 6), (6, 9)], tmp_path)
    assert torch.equal(reader.read_whole("x"), tensor)


@pytest.mark.parametrize(("pieces", "missing"), [([(0, 2), (4, 6)], "2 … 5"), ([(0, 5)], "5 … 5"), ([(1, 6)], "0 … 5")])
def test_rows_that_are_in_no_file_are_named(pieces: list[tuple[int, int]], missing: str, tmp_path: Path) -> None:
    reader = write(torch.randn(6, 2), pieces, tmp_path)
    with pytest.raises(BadCheckpoint, match=f"rows {missing} of x are in no file"):
        reader.read_whole("x")


@pytest.mark.parametrize("rows", [(0, 2), (0, 0)])
def test_a_tensor_that_nobody_wrote_is_missing_even_if_no_row_of_it_is_asked_for(
    rows: tuple[int, int], tmp_path: Path
) -> None:
    with pytest.raises(BadCheckpoint, match="of y are in no file"):
        write(torch.randn(2, 2), [(0, 2)], tmp_path).read("y", *rows)


def test_a_file_that_does_not_say_which_rows_it_holds_is_refused(tmp_path: Path) -> None:
    write_tensors({"x": torch.ones(2)}, tmp_path / "rank-0.safetensors", {})
    with pytest.raises(BadCheckpoint, match=r"rank-0\.safetensors does not say which rows"):
        SliceReader([tmp_path / "rank-0.safetensors"])


def test_a_rank_that_holds_nothing_writes_a_file_that_can_be_read(tmp_path: Path) -> None:
    write_slices({"x": Slice(torch.empty(0, 3), 4, 4)}, tmp_path / "rank-0.safetensors")
    assert SliceReader([tmp_path / "rank-0.safetensors"]).names == set()


def test_a_copy_in_host_memory_does_not_follow_the_original() -> None:
    original = torch.zeros(4, 3)
    copies = copy_to_host({"x": Slice(original[:, 1:], 2, 9)})
    original += 1
    assert (copies["x"].start, copies["x"].total) == (2, 9)
    assert copies["x"].rows.is_contiguous() and not bool(copies["x"].rows.any())
