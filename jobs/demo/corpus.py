"""Owns the text of `builtin:python-docs`: the English prose that every Python installation carries.

Refuses to import what it reads, to touch the network, or to need anything but the standard library.

Two places hold real prose: `pydoc_data.topics` (the language reference, as `help("with")` shows it) and the
docstrings of the standard library. Docstrings are read with `ast` from the source files: importing seven
hundred modules would run their side effects, and `python -OO` would find none.

The text depends on the Python version, a little on the distribution (Debian ships `tkinter` apart), and on
nothing else: no clock, no random draw, no hash order.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

#: Documents shorter than this many characters are left out: a line or two says nothing about prose.
MIN_CHARACTERS = 200

#: A paragraph of at least this many characters is in one document; shorter ones ("Return a string.") may repeat.
MIN_REPEATED_CHARACTERS = 40

#: Folders that are not the library: tests, other people's packages, and applications.
SKIPPED_FOLDERS = frozenset(
    ["test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "idlelib", "lib2to3", "turtledemo"]
)

_LINE_ENDS = re.compile(r"\r\n?|[\v\f\x1c-\x1e\x85\u2028\u2029]")
_NOT_TEXT = re.compile(r"[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff]")
_INNER_SPACES = re.compile(r"(?<=\S)[ \t\xa0]+")
_BLANK_RUN = re.compile(r"\n{2,}")
_HEADING = re.compile(r"\n\n(?=\S[^\n]*\n(?:\*{3,}|={3,}|-{3,}|~{3,})\n)")


@dataclass(frozen=True, slots=True)
class Document:
    """One text of the corpus.

    Attributes:
        title: `module json.decoder`, `module json.decoder.JSONDecoder` or `topic with 00`; the sort key.
        text: Clean prose of at least `MIN_CHARACTERS`; paragraphs are separated by one blank line.
    """

    title: str
    text: str


def documents() -> Iterator[Document]:
    """Yields every document, sorted by title; no paragraph is in two of them.

    The reference repeats whole sections (`if` is also part of `compound`), and docstrings get copied. A held-out
    copy of a training text would flatter every model, hence a paragraph stays in the first document that has it,
    and a document that is mostly repeats is left out.

    A document is a section of a topic, a class with its methods, or what else a module has to say. Whole topics
    and modules would be too coarse: in Python 3.11, 3.12 and 3.13 the held-out tenth of them holds 4, 8 and 13 %
    of the characters (so: 9, 12 and 9 %), and one edited line moves 50,000 characters to the other side.
    """
    seen: set[str] = set()
    for title, raw in sorted([*_topics(), *_modules(Path(sysconfig.get_path("stdlib")))]):
        whole = clean(raw)
        paragraphs = {paragraph: " ".join(paragraph.split()) for paragraph in whole.split("\n\n")}
        text = "\n\n".join(paragraph for paragraph, key in paragraphs.items() if key not in seen)
        if len(text) >= max(MIN_CHARACTERS, len(whole) / 2):
            seen.update(key for key in paragraphs.values() if len(key) >= MIN_REPEATED_CHARACTERS)
            yield Document(title, text)


def clean(raw: str) -> str:
    """Dedented text with `\\n` line ends, one space between words, one blank line between paragraphs.

    Indentation is kept: it is what marks examples and lists. Control characters and lone surrogates go.
    """
    text = textwrap.dedent(_LINE_ENDS.sub("\n", raw).expandtabs())
    text = _INNER_SPACES.sub(" ", _NOT_TEXT.sub("", text))
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return _BLANK_RUN.sub("\n\n", text).strip("\n")


def _topics() -> Iterator[tuple[str, str]]:
    """The sections of every topic, numbered; a section begins with its heading."""
    from pydoc_data.topics import topics  # half a megabyte of literals: only when asked for

    for name, text in topics.items():
        for number, section in enumerate(_HEADING.split(clean(text))):
            yield f"topic {name} {number:02}", section


def _modules(root: Path) -> Iterator[tuple[str, str]]:
    """Every module under `root` that has a name: its classes, and the rest of it."""
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.isdisjoint(parts[:-1]) and all(part.isidentifier() for part in parts):
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            yield from _pieces(f"module {name}", _parsed(path))


def _pieces(title: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Docstrings in source order: those of each class at the top level, then those of everything else.

    A class that says less than a document must goes with the rest, and so does the second class of one name.
    """
    classes: dict[str, str] = {}
    rest = [ast.get_docstring(tree) or ""]
    for node in tree.body:
        text = "\n\n".join(_docstrings(node))
        if isinstance(node, ast.ClassDef) and node.name not in classes and len(clean(text)) >= MIN_CHARACTERS:
            classes[node.name] = text
        else:
            rest.append(text)
    yield title, "\n\n".join(rest)
    yield from ((f"{title}.{name}", text) for name, text in classes.items())


def _parsed(path: Path) -> ast.Module:
    """The file's syntax tree; an empty one for a file that is not Python of this version."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library's own invalid escapes are not our user's business
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ast.Module(body=[], type_ignores=[])


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings of a node and of the statements in it. Expressions, most of a tree, hold none."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring:
            yield docstring
    for block in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, block, None) or ():
            yield from _docstrings(child)


def main(argv: list[str] | None = None) -> None:
    """Writes the corpus as JSON lines, for people who want to see it."""
    parser = argparse.ArgumentParser(prog="python -m jobs.demo.corpus", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the .jsonl file to write: title, text")
    out: Path = parser.parse_args(argv).out
    found = list(documents())
    with out.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(asdict(document), ensure_ascii=False) + "\n" for document in found)
    characters = sum(len(document.text) for document in found)
    print(f"{out}: {len(found)} documents, {characters / 1e6:.2f} M characters")


if __name__ == "__main__":
    main()
