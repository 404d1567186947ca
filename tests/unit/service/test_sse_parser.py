"""The event stream parser of the client."""

from __future__ import annotations

import pytest

from service.sse import SseMessage, parse_stream

STREAM = b': ping\r\n\r\nid: 4\r\nevent: note\r\ndata: {"a":\r\ndata: 1}\r\n\r\nevent: done\r\ndata: {}\r\n\r\n'
EXPECTED = [SseMessage("4", "note", '{"a":\n1}'), SseMessage("4", "done", "{}")]


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1000])
def test_messages_do_not_depend_on_how_the_bytes_are_cut(piece: int) -> None:
    chunks = [STREAM[i : i + piece] for i in range(0, len(STREAM), piece)]
    assert list(parse_stream(chunks)) == EXPECTED


def test_bare_line_feeds_work_as_well() -> None:
    assert list(parse_stream([STREAM.replace(b"\r\n", b"\n")])) == EXPECTED


def test_a_message_cut_off_by_the_end_is_dropped() -> None:
    assert list(parse_stream([STREAM[:-4]])) == EXPECTED[:1]


def test_unicode_line_separators_stay_inside_the_data() -> None:
    (message,) = parse_stream(["data: a\u2028b\x0bc\x85d\n\n".encode()])
    assert message.data == "a\u2028b\x0bc\x85d"
