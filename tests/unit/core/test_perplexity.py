"""Quality against a plain float64 loop, on models whose logits are a table."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kbop_core.perplexity import evaluate
from kbop_core.text import Windows

VOCABULARY = 11


class Table(nn.Module):
    """The next token depends on the last one and on how many came before: a causal model in two tables."""

    def __init__(self, seed: int, size: float = 2.0) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.last = nn.Parameter(size * torch.randn(VOCABULARY, VOCABULARY, generator=rng))
        self.place = nn.Parameter(size * torch.randn(32, VOCABULARY, generator=rng))
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        self.shapes.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=self.last[input_ids] + self.place[: input_ids.shape[1]])


def make_windows(lengths: list[int], seed: int = 0) -> Windows:
    ids = torch.randint(0, VOCABULARY, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    return Windows(ids, torch.tensor(lengths), "by hand")


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum())


def rows_of(model: Table, windows: Windows) -> list[tuple[np.ndarray, int]]:
    """(log probabilities, the token that came) of every prediction, in float64, one by one."""
    last, place = model.last.detach().double().numpy(), model.place.detach().double().numpy()
    found = []
    for row, length in zip(windows.ids_NT.tolist(), windows.lengths_N.tolist(), strict=True):
        for t in range(length - 1):
            found.append((log_softmax(last[row[t]] + place[t]), row[t + 1]))
    return found


LENGTHS = {"full": [9] * 5, "ragged": [9, 2, 5, 9, 3, 2, 7], "one": [6], "shortest": [2]}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("batch", [1, 2, 3, 100])
def test_perplexity_is_that_of_a_plain_float64_loop(lengths: list[int], batch: int) -> None:
    model, windows = Table(0), make_windows(lengths)
    nll = -np.mean([log_p[token] for log_p, token in rows_of(model, windows)])
    quality = evaluate(model, windows, batch)
    assert quality.tokens == windows.predicted == sum(lengths) - len(lengths)
    assert quality.nll == pytest.approx(nll, rel=1e-6)
    assert quality.perplexity == pytest.approx(math.exp(nll), rel=1e-6)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_closeness_to_the_teacher_is_that_of_a_plain_float64_loop(lengths: list[int]) -> None:
    model, teacher, windows = Table(0), Table(1), make_windows(lengths)
    pairs = list(zip(rows_of(model, windows), rows_of(teacher, windows), strict=True))
    kl = np.mean([(np.exp(p) * (p - q)).sum() for (q, _), (p, _) in pairs])
    same = np.mean([q.argmax() == p.argmax() for (q, _), (p, _) in pairs])
    quality = evaluate(model, windows, 2, teacher)
    assert quality.kl_to_teacher == pytest.approx(kl, rel=1e-5)
    assert quality.top1_agreement == pytest.approx(same)


def test_a_model_is_its_own_best_teacher() -> None:
    quality = evaluate(Table(0), make_windows([9, 4]), 2, Table(0))
    assert quality.kl_to_teacher == pytest.approx(0.0, abs=1e-7)
    assert quality.top1_agreement == 1.0


def test_without_a_teacher_closeness_is_unknown_not_zero() -> None:
    quality = evaluate(Table(0), make_windows([9]), 2)
    assert quality.kl_to_teacher is None
    assert quality.top1_agreement is None


def test_what_lies_beyond_a_windows_length_does_not_count() -> None:
    windows = make_windows([9, 4, 2])
    other = Windows(windows.ids_NT.clone(), windows.lengths_N, "by hand")
    other.ids_NT[1, 4:], other.ids_NT[2, 2:] = 5, 7
    assert evaluate(Table(0), windows, 3) == evaluate(Table(0), other, 3)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity() -> None:
    assert evaluate(Table(0, size=0.0), make_windows([9, 9, 3]), 2).perplexity == pytest.approx(VOCABULARY)


def test_an_overflowing_perplexity_is_infinite_and_its_nll_is_kept() -> None:
    quality = evaluate(Table(0, size=1000.0), make_windows([9] * 4), 2)
    assert quality.perplexity == math.inf
    assert 700 < quality.nll < math.inf


def test_batches_hold_windows_of_like_length() -> None:
    model = Table(0)
    evaluate(model, make_windows([9, 2, 9, 2]), 2)
    assert sorted(model.shapes) == [(2, 2), (2, 9)]


def test_progress_counts_this_ranks_batches() -> None:
    told: list[tuple[int, int]] = []
    evaluate(Table(0), make_windows([9] * 5), 2, progress=lambda *place: told.append(place))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_measuring_leaves_no_gradient_behind() -> None:
    model = Table(0)
    evaluate(model, make_windows([9]), 1)
    assert all(p.grad is None for p in model.parameters())
