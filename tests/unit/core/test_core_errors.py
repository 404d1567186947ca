"""The exception tree: what its module draws is what exists, and every error can be told apart."""

from __future__ import annotations

import inspect
import re

import pytest

from kbop_core import errors
from kbop_core.errors import KbopError, OutOfMemory

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, KbopError)]


def depth_of(error: type[KbopError]) -> int:
    return len(error.__mro__) - len(KbopError.__mro__)


def test_the_tree_in_the_docstring_is_the_tree_in_the_code() -> None:
    drawn = re.findall(r"^    ([│├└─ ]*)([A-Z]\w+)", errors.__doc__ or "", re.MULTILINE)
    tree = {name: len(lead) // 4 for lead, name in drawn}
    assert tree == {c.__name__: depth_of(c) for c in CLASSES}


def test_every_error_has_a_code_of_its_own() -> None:
    codes = [c.code for c in CLASSES]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z0-9_]+", code) for code in codes)


@pytest.mark.parametrize("error", [c for c in CLASSES if c is not OutOfMemory])
def test_message_and_hint_are_kept_apart(error: type[KbopError]) -> None:
    raised = error("what happened", "what to do")
    assert (str(raised), raised.message, raised.hint) == ("what happened", "what happened", "what to do")
    assert raised.origin in {"user", "system"}
    assert isinstance(raised.retryable, bool)


@pytest.mark.parametrize(
    ("windows", "again", "advice"), [(1, False, "shorten method.context"), (2, True, "half as many")]
)
def test_out_of_memory_is_tried_again_only_with_fewer_windows(windows: int, again: bool, advice: str) -> None:
    raised = OutOfMemory(windows, "CUDA out of memory.")
    assert (raised.micro_batch, raised.retryable, raised.origin) == (windows, again, "system")
    assert raised.message == f"a micro-step of {windows} windows does not fit into memory: CUDA out of memory."
    assert advice in raised.hint
