"""How evidence is stored: both kinds against plain float64 sums, ragged widths, rows without any, tiny values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kbop_core import evidence
from kbop_core.evidence import BLOCK, Evidence, EvidenceKind, make_evidence

CPU = torch.device("cpu")
WIDTHS = [1, 63, 64, 65, 129]
every_kind = pytest.mark.parametrize("kind", ["bfloat16", "int8"])
every_width = pytest.mark.parametrize("columns", WIDTHS)


def noise(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Gaussian, the rows of very different size."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return values * torch.logspace(-3, 3, rows)[:, None]


def filled(kind: EvidenceKind, gradient: Tensor) -> Evidence:
    evidence = make_evidence(kind, *gradient.shape, CPU)
    evidence.add(gradient.clone(), 1.0)
    return evidence


def allowed(kind: EvidenceKind, exact: Tensor) -> Tensor:
    """The largest error that rounding once may make, float64: half of the last of eight bits, or 1/254 of a block."""
    magnitude = exact.double().abs()
    if kind == "bfloat16":
        return magnitude * 2.0**-8
    largest = [block.amax(1, keepdim=True).expand(block.shape) for block in magnitude.split(BLOCK, 1)]
    return torch.cat(largest, 1) / 254 * (1 + 1e-5)


@every_kind
@every_width
def test_new_evidence_is_zero_everywhere(kind: EvidenceKind, columns: int) -> None:
    values = make_evidence(kind, 3, columns, CPU).values()
    assert (values.dtype, values.shape) == (torch.float32, (3, columns))
    assert not values.any()


@every_kind
@every_width
def test_what_was_added_reads_back_within_one_rounding(kind: EvidenceKind, columns: int) -> None:
    evidence, exact = make_evidence(kind, 5, columns, CPU), torch.zeros(5, columns, dtype=torch.float64)
    for seed, gain in enumerate((1.0, 0.25, -3.0)):
        gradient = noise(5, columns, seed)
        exact = evidence.values().double() + gain * gradient.double()
        evidence.add(gradient.clone(), gain)
        error = (evidence.values().double() - exact).abs()
        assert bool((error <= allowed(kind, exact) + 1e-6 * exact.abs()).all())


@every_width
def test_the_largest_of_an_int8_block_is_kept_and_its_neighbours_to_a_254th_of_it(columns: int) -> None:
    gradient = noise(4, columns)
    error = (filled("int8", gradient).values() - gradient).abs()
    for part, wrong in zip(gradient.abs().split(BLOCK, 1), error.split(BLOCK, 1), strict=True):
        largest, place = part.max(1, keepdim=True)
        assert bool((wrong.gather(1, place) <= 1e-6 * largest).all())
        assert bool((wrong <= largest / 254 * (1 + 1e-5)).all())


def test_a_large_value_coarsens_its_own_int8_block_alone() -> None:
    gradient = torch.full((2, 129), 0.25)
    gradient[0, 64] = 1e6
    values = filled("int8", gradient).values()
    assert not values[0, 65:128].any()
    values[0, 64:128] = 0.25
    torch.testing.assert_close(values, torch.full((2, 129), 0.25), rtol=1e-6, atol=0)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gradients_of_any_precision_are_taken(kind: EvidenceKind, dtype: torch.dtype) -> None:
    gradient = torch.tensor([[127.0, -64.0, 3.0]], dtype=dtype)
    assert torch.equal(filled(kind, gradient).values(), gradient.float())


@every_kind
@every_width
def test_what_is_read_is_a_copy(kind: EvidenceKind, columns: int) -> None:
    evidence = filled(kind, noise(3, columns))
    before = evidence.values()
    evidence.values().fill_(7.0)
    assert torch.equal(evidence.values(), before)


@every_kind
@every_width
@pytest.mark.parametrize("factor", [2.0**-24, 0.5, 8.0, 0.0])
def test_multiplying_by_a_power_of_two_or_by_zero_is_exact(kind: EvidenceKind, columns: int, factor: float) -> None:
    evidence = filled(kind, noise(4, columns))
    before = evidence.values()
    evidence.multiply(factor)
    assert torch.equal(evidence.values(), before * factor)


@every_kind
@every_width
@pytest.mark.parametrize("factor", [-1.0, -0.5, 0.0])
def test_scaled_places_change_by_the_factor_and_the_others_stay(
    kind: EvidenceKind, columns: int, factor: float
) -> None:
    evidence = filled(kind, noise(4, columns))
    before, places = evidence.values(), torch.arange(0, 4 * columns, 3)
    expected = before.clone()
    expected.view(-1)[places] *= factor
    evidence.multiply_at(places, factor)
    digit = before.abs().amax(1, keepdim=True) / 127 if kind == "int8" else torch.zeros(())
    assert bool(((evidence.values() - expected).abs() <= 0.51 * digit).all())
    others = torch.ones(4 * columns, dtype=torch.bool)
    others[places] = False
    assert torch.equal(evidence.values().view(-1)[others], before.view(-1)[others])


@every_kind
@every_width
def test_a_shard_without_rows_takes_everything_and_holds_nothing(kind: EvidenceKind, columns: int) -> None:
    evidence = make_evidence(kind, 0, columns, CPU)
    evidence.add(torch.zeros(0, columns), 0.5)
    evidence.multiply(2.0**-24)
    evidence.multiply_at(torch.zeros(0, dtype=torch.int64), -0.5)
    assert evidence.values().shape == (0, columns)
    assert sum(t.nbytes for t in evidence.tensors().values()) == 0


@every_kind
@every_width
def test_copying_the_tensors_copies_the_evidence(kind: EvidenceKind, columns: int) -> None:
    source, target = filled(kind, noise(3, columns)), filled(kind, noise(3, columns, 1))
    for name, tensor in target.tensors().items():
        tensor.copy_(source.tensors()[name])
    assert torch.equal(target.values(), source.values())


@every_width
def test_bfloat16_takes_two_bytes_a_weight_and_int8_one_and_four_a_block(columns: int) -> None:
    size = {
        k: sum(t.nbytes for t in make_evidence(k, 6, columns, CPU).tensors().values()) for k in ("bfloat16", "int8")
    }
    assert size == {"bfloat16": 12 * columns, "int8": 6 * (columns + 4 * -(-columns // 64))}


@every_kind
def test_adding_nothing_many_times_changes_nothing(kind: EvidenceKind) -> None:
    evidence = filled(kind, noise(4, 129))
    before = evidence.values()
    for _ in range(200):
        evidence.add(torch.zeros(4, 129), 0.5)
    torch.testing.assert_close(evidence.values(), before, rtol=1e-5, atol=0)


@every_kind
def test_what_became_too_small_for_a_float_becomes_zero_and_not_noise(kind: EvidenceKind) -> None:
    evidence = filled(kind, noise(4, 65))
    for _ in range(8):
        evidence.multiply(2.0**-24)
        before = evidence.values()
        evidence.add(torch.zeros(4, 65), 1.0)
        assert bool((evidence.values().abs() <= before.abs() * (1 + 1e-5)).all())
        assert bool((evidence.values() * before >= 0).all())
    assert not evidence.values().any()


@pytest.mark.parametrize("kind", ["float32", "int4", "", None])
def test_an_unknown_kind_is_refused_with_the_legal_ones(kind: EvidenceKind) -> None:
    with pytest.raises(ValueError, match=r"evidence is .*; legal: 'bfloat16' \(2 bytes a weight\), 'int8' \(1\.06\)"):
        make_evidence(kind, 2, 8, CPU)


@pytest.mark.parametrize("at_once", [1, 100, 129, 300, 10_000])
def test_int8_evidence_does_not_depend_on_how_many_rows_are_decoded_at_a_time(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = torch.randn(4, 5, 129, generator=torch.Generator().manual_seed(0))
    whole = make_evidence("int8", 5, 129, torch.device("cpu"))
    for gradient in gradients:
        whole.add(gradient.clone(), 0.3)
    monkeypatch.setattr(evidence, "AT_ONCE", at_once)
    pieces = make_evidence("int8", 5, 129, torch.device("cpu"))
    for gradient in gradients:
        pieces.add(gradient.clone(), 0.3)
    assert torch.equal(pieces.values(), whole.values())
