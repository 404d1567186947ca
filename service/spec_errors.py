"""What is wrong with a job spec, in words and with a JSON pointer per field.

Refuses to know who asks: the server puts these into problems, the CLI prints them.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from jobs.spec import DataSource, JobSpec, MethodSpec, ResourceSpec

#: Where every field of the spec is, for "did you mean"; `*` stands for a position in a list.
_PARTS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("", JobSpec),
    ("/method", MethodSpec),
    ("/resources", ResourceSpec),
    ("/data/*", DataSource),
)
FIELD_POINTERS = tuple(f"{base}/{name}" for base, model in _PARTS for name in model.model_fields)


class InvalidJson(ValueError):
    """The text is not JSON at all."""


class InvalidSpec(ValueError):
    """The text is JSON but not a job spec; `errors` holds a pointer and a sentence per mistake."""

    def __init__(self, errors: Sequence[tuple[str, str]]) -> None:
        self.errors = tuple(errors)
        super().__init__("; ".join(f"{pointer}: {detail}" if pointer else detail for pointer, detail in errors))


def parse_spec(text: bytes | str) -> JobSpec:
    """The spec of a JSON text. Strict: `"5"` is not a number and `true` is not 1.

    Raises:
        InvalidJson: Not JSON.
        InvalidSpec: JSON, but unknown fields, wrong types or values out of range.
    """
    try:
        return JobSpec.model_validate_json(text, strict=True)
    except ValidationError as error:
        details = error.errors(include_url=False)
        if details[0]["type"] == "json_invalid":
            raise InvalidJson(str(details[0]["msg"]).removeprefix("Invalid JSON: ")) from error
        raise InvalidSpec([(pointer_of(d["loc"]), explain(d)) for d in details]) from error


def pointer_of(loc: Sequence[int | str]) -> str:
    """The RFC 6901 pointer of a pydantic location; the empty pointer is the whole document."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in loc)


def explain(detail: Mapping[str, Any]) -> str:
    """One pydantic error as a sentence, with the value where it is short enough to help."""
    if detail["type"] == "extra_forbidden":
        return _unknown_field(str(detail["loc"][-1]))
    message = str(detail["msg"]).removeprefix("Value error, ")
    value = detail.get("input")
    if detail["type"] in ("missing", "value_error") or isinstance(value, (dict, list, tuple)):
        return message
    shown = repr(value)
    return f"{message}, got {shown if len(shown) <= 80 else shown[:77] + '...'}"


def _unknown_field(name: str) -> str:
    names = {pointer.rsplit("/", 1)[1]: pointer for pointer in reversed(FIELD_POINTERS)}
    close = [name] if name in names else difflib.get_close_matches(name, names, n=1)
    return "unknown field" + (f"; did you mean {names[close[0]]}?" if close else "")
