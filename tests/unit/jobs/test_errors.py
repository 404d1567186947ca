"""The exception tree."""

from __future__ import annotations

import re

import jobs.errors
from jobs.errors import JobsError


def tree(root: type[JobsError]) -> list[type[JobsError]]:
    return [root] + [leaf for child in root.__subclasses__() for leaf in tree(child)]


def test_every_error_has_a_code_of_its_own():
    codes = [error.code for error in tree(JobsError)]
    assert len(codes) == len(set(codes))


def test_the_drawing_at_the_top_shows_every_error_and_no_other():
    drawn = set(re.findall(r"[├└]── (\w+)", jobs.errors.__doc__ or "")) | {"JobsError"}
    assert drawn == {error.__name__ for error in tree(JobsError)}
