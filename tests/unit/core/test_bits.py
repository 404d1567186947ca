"""Signs ↔ bytes, against numpy's own packing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kbop_core.bits import pack_bits, pack_signs, packed_width, unpack_signs

COLUMNS = [0, 1, 7, 8, 9, 127, 128, 129]


def random_mask(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(rows * 1000 + columns).integers(0, 2, (rows, columns)).astype(bool)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", [1, 5])
def test_packing_is_numpys_little_bit_order(rows: int, columns: int) -> None:
    mask = random_mask(rows, columns)
    packed = pack_bits(torch.from_numpy(mask))
    assert packed.dtype == torch.uint8
    np.testing.assert_array_equal(packed.numpy(), np.packbits(mask, axis=-1, bitorder="little"))


@pytest.mark.parametrize("columns", COLUMNS)
def test_zero_rows_pack_to_zero_rows(columns: int) -> None:
    assert pack_bits(torch.zeros(0, columns, dtype=torch.bool)).shape == (0, packed_width(columns))


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_unpacking_gives_back_the_signs_in_the_wanted_dtype(columns: int, dtype: torch.dtype) -> None:
    signs = torch.from_numpy(random_mask(3, columns) * 2.0 - 1.0).to(dtype)
    again = unpack_signs(pack_signs(signs), columns, dtype)
    assert again.dtype == dtype
    assert again.is_contiguous()
    assert torch.equal(again, signs)


@given(st.lists(st.lists(st.booleans(), min_size=21, max_size=21), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_any_mask_survives_the_round_trip(rows: list[list[bool]]) -> None:
    mask = torch.tensor(rows)
    assert torch.equal(unpack_signs(pack_bits(mask), mask.shape[-1]) > 0, mask)


@pytest.mark.parametrize("columns", [1, 7, 9, 127, 129])
def test_unused_bits_of_the_last_byte_are_zero(columns: int) -> None:
    packed = pack_signs(torch.ones(4, columns))
    assert packed[:, -1].tolist() == [2 ** (columns % 8) - 1] * 4


def test_the_first_sign_is_the_least_significant_bit() -> None:
    weight = -torch.ones(1, 16)
    weight[0, [0, 9]] = 1.0
    assert pack_signs(weight).tolist() == [[0b1, 0b10]]


@pytest.mark.parametrize(("value", "bit"), [(0.0, 1), (-0.0, 1), (1e-45, 1), (-1e-45, 0), (float("nan"), 0)])
def test_sign_of_zero_is_plus_one(value: float, bit: int) -> None:
    assert pack_signs(torch.tensor([[value]])).item() == bit


def test_packing_takes_leading_dimensions_as_they_are() -> None:
    mask = torch.from_numpy(random_mask(6, 11)).view(2, 3, 11)
    packed = pack_bits(mask)
    assert packed.shape == (2, 3, 2)
    assert torch.equal(packed.view(6, 2), pack_bits(mask.view(6, 11)))


def test_a_transposed_mask_packs_like_its_copy() -> None:
    mask = torch.from_numpy(random_mask(16, 5)).t()
    assert not mask.is_contiguous()
    assert torch.equal(pack_bits(mask), pack_bits(mask.contiguous()))


@pytest.mark.parametrize(("width", "columns"), [(1, 9), (2, 8), (0, 1), (16, 129), (17, 128)])
def test_a_wrong_width_is_an_error(width: int, columns: int) -> None:
    with pytest.raises(ValueError, match=f"{columns} signs are {packed_width(columns)} bytes a row, got {width}"):
        unpack_signs(torch.zeros(2, width, dtype=torch.uint8), columns)


def test_a_table_first_used_in_inference_mode_still_serves_training() -> None:
    packed = torch.tensor([[0b101]], dtype=torch.uint8)
    with torch.inference_mode():
        unpack_signs(packed, 3, torch.float64)
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    (unpack_signs(packed, 3, torch.float64) @ x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, -1.0, 1.0]


def test_changing_the_result_does_not_change_the_table() -> None:
    packed = torch.full((1, 1), 255, dtype=torch.uint8)
    unpack_signs(packed, 8).fill_(7.0)
    assert unpack_signs(packed, 8).tolist() == [[1.0] * 8]
