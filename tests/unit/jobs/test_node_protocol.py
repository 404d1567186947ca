"""Messages on a pipe."""

from __future__ import annotations

import os

import pytest

from jobs.node_protocol import MessageReader, send


@pytest.fixture
def pipe():
    read, write = os.pipe()
    yield read, write
    for fd in (read, write):
        try:
            os.close(fd)
        except OSError:
            continue


def test_messages_come_out_as_they_went_in(pipe):
    reader = MessageReader(pipe[0])
    assert send(pipe[1], "ready", port=1) and send(pipe[1], "beat")
    assert reader.read() == [{"say": "ready", "port": 1}, {"say": "beat"}]
    assert reader.read() == [] and not reader.closed


def test_a_message_in_pieces_is_one_message(pipe):
    reader = MessageReader(pipe[0])
    os.write(pipe[1], b'{"say": ')
    assert reader.read() == []
    os.write(pipe[1], b'"beat"}\n{"say"')
    assert reader.read() == [{"say": "beat"}]


@pytest.mark.parametrize("noise", [b"Welcome!", b"", b"[1]", b"{}", b'{"say": 1}', b"\xff\xfe"])
def test_what_a_login_shell_prints_is_passed_over(pipe, noise):
    os.write(pipe[1], noise + b'\n{"say": "beat"}\n')
    assert MessageReader(pipe[0]).read() == [{"say": "beat"}]


def test_a_closed_pipe_is_noticed_by_the_reader_after_the_last_message(pipe):
    reader = MessageReader(pipe[0])
    send(pipe[1], "beat")
    os.close(pipe[1])
    assert reader.read() == [{"say": "beat"}] and not reader.closed
    assert reader.read() == [] and reader.closed


def test_a_closed_pipe_is_noticed_by_the_sender(pipe):
    os.close(pipe[0])
    assert not send(pipe[1], "beat")
