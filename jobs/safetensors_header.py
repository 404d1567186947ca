"""The header of a safetensors file, checked without reading a tensor and without the safetensors library.

Refuses to return any weights: it answers whether the sizes a file declares are those it has, and which shapes it holds.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from jobs.errors import BadWeights

#: Bits of one element. Types below a byte exist and make the product, not each element, whole bytes.
_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
#: The same limit as the safetensors library: a larger header is an attack or damage.
_MAX_HEADER_BYTES = 100_000_000


def check_safetensors(path: Path) -> None:
    """Raise BadWeights unless the header is sound and the tensors fill the file without gap or overlap."""
    size = path.stat().st_size
    length, header = _read_header(path, size)
    spans = sorted(_span(path, name, entry) for name, entry in header.items() if name != "__metadata__")
    position = 0
    for begin, end in spans:
        if begin != position:
            raise _bad(path, f"its tensors leave a gap or overlap at byte {position}")
        position = end
    if position != size - 8 - length:
        raise _bad(path, f"its tensors need {position} bytes, the file holds {size - 8 - length}")


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor in the file. Raises BadWeights for a header that is not sound."""
    _, header = _read_header(path, path.stat().st_size)
    found = {name: entry for name, entry in header.items() if name != "__metadata__"}
    for name, entry in found.items():
        _span(path, name, entry)
    return {name: tuple(int(n) for n in entry["shape"]) for name, entry in found.items()}


def _read_header(path: Path, size: int) -> tuple[int, dict[str, Any]]:
    """Length of the header in bytes, and what it says."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            raise _bad(path, f"its header claims {length} bytes, the file has {size}")
        return length, _parse(path, file.read(length))


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except ValueError:
        raise _bad(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _bad(path, "its header is not a JSON object")
    return header


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """First and last+1 byte of one tensor, checked against its type and shape."""
    try:
        bits, shape = _BITS[entry["dtype"]], [int(n) for n in entry["shape"]]
        begin, end = (int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise _bad(path, f"tensor {name!r} has no known type, shape and offsets") from None
    if min([begin, *shape], default=0) < 0 or (end - begin) * 8 != math.prod(shape) * bits:
        raise _bad(
            path,
            f"tensor {name!r} of shape {shape} and type {entry['dtype']} cannot fill {end - begin} bytes",
        )
    return begin, end


def _bad(path: Path, why: str) -> BadWeights:
    return BadWeights(
        f"{path.name} is damaged or not a safetensors file: {why}", "copy the file again and compare its size"
    )
