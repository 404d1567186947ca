"""Tables of results in documents: only what stands between a command's markers is replaced."""

from __future__ import annotations

from pathlib import Path

from benchmarks.record import fill, markdown


def test_a_section_replaces_only_what_stands_between_its_markers(tmp_path: Path) -> None:
    file = tmp_path / "document.md"
    begin, end = "<!-- rows: begin, by make x -->", "<!-- rows: end -->"
    file.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    fill(file, {"rows": "new", "absent": "nowhere"}, "make x")
    assert file.read_text() == f"before\n{begin}\nnew\n{end}\nafter\n"


def test_the_sections_of_another_command_stay(tmp_path: Path) -> None:
    file = tmp_path / "document.md"
    file.write_text(text := "<!-- rows: begin, by make x -->\nold\n<!-- rows: end -->\n")
    fill(file, {"rows": "new"}, "make y")
    assert file.read_text() == text


def test_cells_are_short_numbers_and_plain_words() -> None:
    rows = [{"name": "a", "count": 12_345, "share": 0.123456, "holds": False, "none": None}]
    assert markdown(rows).splitlines()[2] == "| a | 12,345 | 0.1235 | **no** |  |"
