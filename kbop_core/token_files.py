"""Owns how documents become token files: parts of a source, made by all ranks, whole or absent. Refuses to read them
back as windows (token_store.py) and to know where the rows come from.

    part-000000.bin     token ids of rows 0 … 511 of the source, one after the other: little-endian uint16 where the
                        model's vocabulary fits, uint32 otherwise
    part-000000.json    Part; written after the .bin is synced: a part without it does not exist
    index.json          Index; written last, by rank 0

Part k holds rows [k·512, (k+1)·512) of the source, whatever the number of ranks: rank r of N makes the parts r, r + N,
r + 2N, …, and a part that is whole is not made again. So the part number is the cursor: a killed run goes on where it
was, also with another number of ranks, and the folder ends with the same bytes. Reading stops after the first part
with which the parts so far hold enough tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kbop_core.checkpoint import sha256, write_json
from kbop_core.documents import Rows
from kbop_core.errors import UnsupportedModel
from kbop_core.shard import Gang
from kbop_core.text import Tokenize

PART_ROWS = 512
INDEX_FILE = "index.json"


@dataclass(frozen=True)
class Recipe:
    """How the documents of a source become tokens.

    Attributes:
        tokenize: one document → ids.
        vocabulary: ids the model can read: 0 … vocabulary − 1.
        keep: whether a document is used (its side of the split).
        check: raises when a document that is used must not be.
        made_from: names all that the tokens depend on; a part that was made from something else is made again.
    """

    tokenize: Tokenize
    vocabulary: int
    keep: Callable[[str], bool]
    check: Callable[[str], None]
    made_from: str

    @property
    def dtype(self) -> str:
        """Of the token files, in NumPy's words."""
        return "<u2" if self.vocabulary <= 1 << 16 else "<u4"


@dataclass(frozen=True)
class Part:
    """What a part holds.

    Attributes:
        rows: of the source, 1 … PART_ROWS; fewer than PART_ROWS: the source ends here.
        documents: rows that are used.
        tokens: of all of them.
        sha256: of the .bin file.
        text_sha256: of the documents, each followed by a zero byte.
        made_from: Recipe.made_from.
    """

    rows: int
    documents: int
    tokens: int
    sha256: str
    text_sha256: str
    made_from: str


@dataclass(frozen=True)
class Index:
    """A source that is tokenised.

    Attributes:
        dtype: Recipe.dtype.
        parts: in order.
        whole: whether the source was read to its end.
    """

    dtype: str
    parts: tuple[Part, ...]
    whole: bool

    @property
    def tokens(self) -> int:
        """Of all parts."""
        return sum(part.tokens for part in self.parts)

    @property
    def documents(self) -> int:
        """Of all parts."""
        return sum(part.documents for part in self.parts)

    @property
    def text_sha256(self) -> str:
        """Of the parts' text digests."""
        return hashlib.sha256("".join(part.text_sha256 for part in self.parts).encode()).hexdigest()


def part_file(folder: Path, number: int) -> Path:
    """Token ids of a part."""
    return folder / f"part-{number:06d}.bin"


def check_vocabulary(largest: int, vocabulary: int) -> None:
    """Refuse a tokenizer that is not the model's.

    Raises:
        UnsupportedModel: a token id that the model has no embedding for.
    """
    if largest >= vocabulary:
        raise UnsupportedModel(
            f"the tokenizer gives token {largest}, the model's embedding ends at {vocabulary - 1}",
            "the tokenizer belongs to another model: put the right one into the model's folder",
        )


def tokenise(
    rows: Rows,
    recipe: Recipe,
    folder: Path,
    enough: int,
    gang: Gang,
    device: torch.device,
    tell: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Make the token files of a source, all ranks together; afterwards the folder has an index.

    Args:
        rows: the source.
        recipe: what to do with a document.
        folder: of this source alone; exists, and every rank sees it.
        enough: tokens with which reading stops.
        gang, device: whose collectives tell how much there is.
        tell: told the number of tokens so far.

    Raises:
        UnsupportedModel: on the rank that met it, a token beyond the vocabulary.
        DataError: on the rank that met it, whatever `rows` and `recipe.check` refuse.
    """
    cursor, tokens = _Cursor(rows), 0
    for first in count(0, gang.size):
        number = first + gang.rank
        part = whole_part(folder, number, recipe.made_from) or _make_part(cursor, recipe, folder, number)
        mine = torch.tensor([part.rows, part.tokens] if part else [0, 0], device=device)
        for offset, (found, added) in enumerate(seen.tolist() for seen in gang.all_gather(mine)):
            tokens += added
            if found < PART_ROWS or tokens >= enough:
                if gang.rank == 0:
                    _finish(folder, recipe.dtype, first + offset + (found > 0), whole=found < PART_ROWS)
                gang.all_gather(mine)  # nobody reads the index before it is there
                return tell(tokens)
        tell(tokens)
    return None


def read_index(folder: Path) -> Index:
    """The index of a folder that `tokenise` finished.

    Raises:
        OSError, ValueError, KeyError, TypeError: there is none, or it is not one.
    """
    found = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    return Index(found["dtype"], tuple(Part(**part) for part in found["parts"]), found["whole"])


def whole_part(folder: Path, number: int, made_from: str) -> Part | None:
    """A part that is there, undamaged and made from the same; None otherwise."""
    file = part_file(folder, number)
    try:
        part = Part(**json.loads(file.with_suffix(".json").read_text(encoding="utf-8")))
        return part if part.made_from == made_from and part.sha256 == sha256(file) else None
    except (OSError, ValueError, TypeError):
        return None


class _Cursor:
    """Reads a source forward, a part at a time; the first part it is asked for may be any."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self._undecoded: Iterator[Any] | None = None
        self._place = 0

    def part(self, number: int) -> Iterator[str | None]:
        """Texts of the part's rows; all must be read before the next part is asked for."""
        start = number * PART_ROWS
        if self._undecoded is None:
            self._undecoded, self._place = self.rows.open(start), start
        for _ in islice(self._undecoded, start - self._place):
            pass
        self._place = start + PART_ROWS
        return map(self.rows.decode, islice(self._undecoded, PART_ROWS))


def _make_part(cursor: _Cursor, recipe: Recipe, folder: Path, number: int) -> Part | None:
    """Write a part; None when the source ends before it."""
    file = part_file(folder, number)
    temporary = file.with_name(f".{file.name}.writing")
    digest, text_digest = hashlib.sha256(), hashlib.sha256()
    rows = documents = tokens = 0
    with temporary.open("wb") as out:
        for text in cursor.part(number):
            rows += 1
            if not text or text.isspace() or not recipe.keep(text):
                continue
            recipe.check(text)
            ids = np.asarray(recipe.tokenize(text), dtype=np.int64)
            check_vocabulary(int(ids.max(initial=0)), recipe.vocabulary)
            block = ids.astype(recipe.dtype).tobytes()
            out.write(block)
            digest.update(block)
            text_digest.update(text.encode() + b"\0")
            documents, tokens = documents + 1, tokens + len(ids)
        out.flush()
        os.fsync(out.fileno())
    if not rows:
        temporary.unlink()
        return None
    part = Part(rows, documents, tokens, digest.hexdigest(), text_digest.hexdigest(), recipe.made_from)
    temporary.replace(file)
    write_json(file.with_suffix(".json"), asdict(part))
    return part


def _finish(folder: Path, dtype: str, parts: int, whole: bool) -> None:
    """Write the index, and remove everything else: parts beyond the last, which other numbers of ranks never make."""
    names = {
        file.name for n in range(parts) for file in (part_file(folder, n), part_file(folder, n).with_suffix(".json"))
    }
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()
    found = [json.loads(part_file(folder, n).with_suffix(".json").read_text(encoding="utf-8")) for n in range(parts)]
    write_json(folder / INDEX_FILE, {"dtype": dtype, "parts": found, "whole": whole})
