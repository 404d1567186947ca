"""The training signal, and how windows are dealt to ranks and micro-steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kbop_core import distill
from kbop_core.distill import distillation_loss, teacher_logits, top_k_loss, top_targets
from kbop_core.loop import StepLayout, TrainConfig, layout_steps


def test_the_loss_is_the_mean_kl_from_teacher_to_student() -> None:
    student, teacher = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    p, q = (np.exp(t.double().numpy()) for t in (teacher, student))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    expected = (p * np.log(p / q)).sum(-1).mean()
    assert float(distillation_loss(student, teacher)) == pytest.approx(expected, rel=1e-5)


def test_equal_logits_lose_nothing_and_pull_nowhere() -> None:
    student = torch.randn(2, 3, 7, requires_grad=True)
    loss = distillation_loss(student, student.detach() + 5.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-6)
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("at_once", [1, 14, 20, 41, 42, 1000])
def test_the_loss_in_pieces_is_the_loss(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = torch.randn(2, 3, 7, requires_grad=True), torch.randn(2, 3, 7)
    whole = distillation_loss(student, teacher)
    (expected,) = torch.autograd.grad(whole, student)
    monkeypatch.setattr(distill, "CHUNK", at_once)
    pieces = distillation_loss(student, teacher)
    assert pieces.item() == pytest.approx(whole.item(), rel=1e-6)
    assert torch.equal(torch.autograd.grad(pieces, student)[0], expected)


def test_top_k_is_the_kl_of_k_tokens_and_any_other() -> None:
    student, teacher = torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(2, 3, 7)
    p, q = teacher.double().softmax(-1), student.float().double().softmax(-1)
    order = teacher.argsort(-1, descending=True)
    p, q = p.gather(-1, order), q.gather(-1, order)
    p, q = (torch.cat([t[..., :3], t[..., 3:].sum(-1, keepdim=True)], -1) for t in (p, q))
    found = top_k_loss(student, top_targets(teacher.log_softmax(-1), 3))
    assert float(found) == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)


@pytest.mark.parametrize("k", [1, 4, 7])
def test_top_k_never_exceeds_the_whole_kl_and_is_it_for_all_tokens(k: int) -> None:
    student, teacher = torch.randn(2, 3, 7, requires_grad=True), torch.randn(2, 3, 7)
    part = top_k_loss(student, top_targets(teacher.log_softmax(-1), k))
    whole = distillation_loss(student, teacher)
    (pull,) = torch.autograd.grad(part, student)
    assert bool(pull.isfinite().all()) and float(pull.abs().max()) > 0
    given, most = float(part.detach()), float(whole.detach())
    assert given < most if k < 7 else given == pytest.approx(most, rel=1e-5)
    still = top_k_loss(teacher.requires_grad_(), top_targets(teacher.detach().log_softmax(-1), k))
    assert float(still.detach()) == pytest.approx(0.0, abs=1e-6)


def test_a_teacher_that_is_sure_leaves_no_rest_and_no_nan() -> None:
    teacher = torch.zeros(1, 1, 5)
    teacher[..., 2] = 200.0
    student = torch.randn(1, 1, 5, requires_grad=True)
    loss = top_k_loss(student, top_targets(teacher.log_softmax(-1), 2))
    loss.backward()
    assert student.grad is not None and bool(student.grad.isfinite().all())
    assert float(loss.detach()) == pytest.approx(float(-student.detach().log_softmax(-1)[0, 0, 2]), rel=1e-5)


def test_half_precision_logits_are_compared_in_float32() -> None:
    student, teacher = torch.randn(1, 4, 50).bfloat16(), torch.randn(1, 4, 50).bfloat16()
    loss = distillation_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert float(loss) == float(distillation_loss(student.float(), teacher.float()))


def test_the_teacher_learns_nothing() -> None:
    class Teacher(torch.nn.Linear):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
            logits = super().forward(input_ids.float()[..., None].expand(-1, -1, 4))
            return type("Output", (), {"logits": logits})

    assert not teacher_logits(Teacher(4, 9), torch.zeros(2, 3, dtype=torch.int64)).requires_grad


@given(tokens=st.integers(1, 10_000), context=st.integers(1, 300), ranks=st.integers(1, 8), most=st.integers(1, 16))
def test_every_window_of_a_step_goes_to_exactly_one_place(tokens: int, context: int, ranks: int, most: int) -> None:
    layout = layout_steps(tokens, context, ranks, most)
    dealt = [
        place
        for micro_step in range(layout.micro_steps)
        for rank in range(ranks)
        for place in layout.places(3, micro_step, rank)
    ]
    assert sorted(dealt) == list(range(3 * layout.windows, 4 * layout.windows))
    assert 1 <= layout.micro_batch <= most


@given(tokens=st.integers(1, 10_000), context=st.integers(1, 300), ranks=st.integers(1, 8))
def test_the_layout_is_as_near_to_the_wanted_tokens_as_whole_windows_allow(
    tokens: int, context: int, ranks: int
) -> None:
    layout = layout_steps(tokens, context, ranks, 8)
    assert layout.tokens == layout.windows * context
    assert layout.windows % ranks == 0
    assert abs(layout.tokens - tokens) <= max(context * ranks / 2, context * ranks - tokens)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_step_sees_the_same_windows_with_any_number_of_ranks(ranks: int) -> None:
    layout = StepLayout(context=16, windows=8, ranks=ranks, micro_batch=2)
    seen = {p for m in range(layout.micro_steps) for r in range(ranks) for p in layout.places(5, m, r)}
    assert seen == set(range(40, 48))


@pytest.mark.parametrize(("ranks", "most"), [(1, 8), (2, 8), (3, 8), (4, 2), (6, 1), (12, 8)])
def test_a_run_that_goes_on_on_other_ranks_keeps_its_windows_where_they_can_be_dealt(ranks: int, most: int) -> None:
    layout = layout_steps(2048, 64, ranks, most, windows=12)  # 2048 tokens would be 32 windows
    assert layout.windows == 12
    assert layout.micro_steps * layout.micro_batch * ranks == 12 and layout.micro_batch <= most


@pytest.mark.parametrize("ranks", [5, 7, 24])
def test_windows_that_cannot_be_dealt_equally_give_way_to_the_ranks_own_layout(ranks: int) -> None:
    assert layout_steps(768, 64, ranks, 8, windows=12) == layout_steps(768, 64, ranks, 8)


@pytest.mark.parametrize(("warmup", "steps", "expected"), [(0.0, 10, 1), (0.05, 400, 20), (0.05, 1, 1), (1.0, 7, 7)])
def test_warm_up_is_at_least_one_step(warmup: float, steps: int, expected: int) -> None:
    assert TrainConfig(steps=steps, warmup=warmup).warmup_steps == expected == max(1, math.ceil(warmup * steps))
