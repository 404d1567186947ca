"""What the client repeats, resumes, verifies and refuses, against a scripted server."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from service import client as module
from service.client import ClientError, DownloadError, KbopClient, ProblemError, Unreachable

Answer = httpx.Response | Exception | Callable[[httpx.Request], httpx.Response]
CONTENT = b"0123456789" * 100
SHA = hashlib.sha256(CONTENT).hexdigest()


class Script(httpx.BaseTransport):
    """Answers in order; the last answer repeats."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return as_stream(answer(request) if callable(answer) else answer)


def as_stream(answer: httpx.Response) -> httpx.Response:
    """A fresh response with unread content, as a network transport gives them."""
    if not answer.is_stream_consumed and not hasattr(answer, "_content"):
        return answer
    return httpx.Response(answer.status_code, headers=answer.headers, stream=httpx.ByteStream(answer.content))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_WAITS_S", (0.0, 0.0, 0.0))


def client(script: Script, **options: Any) -> KbopClient:
    return KbopClient("http://kbop.test", transport=script, **options)


def problem(status: int, **members: Any) -> httpx.Response:
    return httpx.Response(status, json={"code": "some_code", "detail": "some detail", **members})


def sse(*messages: str) -> httpx.Response:
    return httpx.Response(200, content="".join(m + "\r\n\r\n" for m in messages).encode())


def event(number: int) -> str:
    return f"id: {number}\r\nevent: note\r\ndata: {json.dumps({'id': number, 'data': {'message': 'x'}})}"


DONE = 'event: done\r\ndata: {"id": "job_1", "status": "succeeded"}'


def test_submit_is_repeated_with_the_same_idempotency_key() -> None:
    script = Script(httpx.ReadTimeout("slow"), httpx.Response(503), httpx.Response(202, json={"id": "job_1"}))
    assert client(script).submit({"model": "m"})["id"] == "job_1"
    assert len({request.headers["idempotency-key"] for request in script.requests}) == 1


def test_a_cancel_that_may_have_arrived_is_not_repeated() -> None:
    script = Script(httpx.ReadTimeout("slow"))
    with pytest.raises(Unreachable):
        client(script).cancel("job_1")
    assert len(script.requests) == 1


def test_no_connection_is_told_with_the_address_and_a_hint() -> None:
    with pytest.raises(Unreachable, match=r"http://kbop\.test") as caught:
        client(Script(httpx.ConnectError("refused"))).get("job_1")
    assert "kbop serve" in caught.value.hint


def test_a_problem_keeps_its_code_detail_and_hint() -> None:
    with pytest.raises(ProblemError) as caught:
        client(Script(problem(422, hint="do this"))).submit({})
    assert (caught.value.code, caught.value.message, caught.value.hint) == (
        "some_code",
        "some detail",
        "do this",
    )


@pytest.mark.parametrize("body", [b"<html>", b"[]", b""])
def test_an_error_that_is_no_problem_still_has_a_message(body: bytes) -> None:
    with pytest.raises(ProblemError, match="HTTP status 404"):
        client(Script(httpx.Response(404, content=body))).get("job_1")


def test_an_answer_that_is_not_json_is_an_error_of_ours() -> None:
    with pytest.raises(ClientError, match="not JSON"):
        client(Script(httpx.Response(200, content=b"hello"))).get("job_1")


@pytest.mark.parametrize("endpoint", ["localhost:8700", "ftp://x", "", "http://"])
def test_an_endpoint_that_is_no_address_is_refused(endpoint: str) -> None:
    with pytest.raises(ClientError, match="not a server address"):
        KbopClient(endpoint)


def test_watch_reconnects_behind_the_last_event_and_repeats_none() -> None:
    script = Script(sse(event(3), event(7)), httpx.ConnectError("gone"), sse(event(9), DONE))
    seen = [(e.kind, e.id) for e in client(script).watch("job_1")]
    assert seen == [("note", 3), ("note", 7), ("note", 9), ("done", 0)]
    assert [r.headers["last-event-id"] for r in script.requests] == ["0", "7", "7"]


def test_watch_gives_up_when_the_server_stays_away() -> None:
    with pytest.raises(Unreachable):
        list(client(Script(sse(event(1)), httpx.ConnectError("gone")), patience_s=0.0).watch("job_1"))


def test_watch_of_a_server_that_never_answered_gives_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_CONNECTION_S", 0.0)
    with pytest.raises(Unreachable):
        list(client(Script(httpx.ConnectError("refused")), patience_s=1000.0).watch("job_1"))


def test_connections_cut_while_nothing_happens_do_not_use_up_the_patience(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter(range(0, 10_000, 50))
    monkeypatch.setattr("service.client.time.monotonic", lambda: float(next(clock)))
    script = Script(*[sse() for _ in range(20)], sse(DONE))
    assert [event.kind for event in client(script).watch("job_1")] == ["done"]


def test_watching_an_unknown_job_ends_at_once() -> None:
    script = Script(problem(404))
    with pytest.raises(ProblemError):
        list(client(script).watch("job_1"))
    assert len(script.requests) == 1


def listing(path: str = "model.safetensors", sha: str = SHA, size: int = len(CONTENT)) -> httpx.Response:
    return httpx.Response(200, json={"data": [{"path": path, "size": size, "sha256": sha, "url": "/file"}]})


def ranged(request: httpx.Request) -> httpx.Response:
    start = int(request.headers.get("range", "bytes=0-")[6:-1])
    return httpx.Response(206 if start else 200, content=CONTENT[start:])


def test_a_download_is_verified_and_put_in_place(tmp_path: Path) -> None:
    script = Script(listing("sub/file.bin"), ranged)
    assert client(script).download("job_1", tmp_path) == [tmp_path / "sub/file.bin"]
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["file.bin"]
    assert (tmp_path / "sub/file.bin").read_bytes() == CONTENT


def test_a_download_goes_on_where_a_part_ended(tmp_path: Path) -> None:
    (tmp_path / f".model.safetensors.{SHA[:16]}.part").write_bytes(CONTENT[:300])
    script = Script(listing(), ranged)
    client(script).download("job_1", tmp_path)
    assert script.requests[1].headers["range"] == "bytes=300-"
    assert script.requests[1].headers["if-range"] == f'"{SHA}"'
    assert (tmp_path / "model.safetensors").read_bytes() == CONTENT


def test_a_connection_lost_in_the_middle_is_resumed(tmp_path: Path) -> None:
    class Broken(httpx.SyncByteStream):
        def __iter__(self) -> Any:
            yield CONTENT[:400]
            raise httpx.ReadError("lost")

    script = Script(listing(), httpx.Response(200, stream=Broken()), ranged)
    client(script).download("job_1", tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == CONTENT
    assert script.requests[2].headers["range"] != "bytes=0-"


def test_a_server_that_ignores_the_range_starts_the_file_anew(tmp_path: Path) -> None:
    (tmp_path / f".model.safetensors.{SHA[:16]}.part").write_bytes(b"old")
    client(Script(listing(), httpx.Response(200, content=CONTENT))).download("job_1", tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == CONTENT


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT + b"x", b"y" * len(CONTENT), b""])
def test_other_bytes_than_announced_never_become_a_file(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="sha256"):
        client(Script(listing(), httpx.Response(200, content=content))).download("job_1", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_different_file_in_the_way_is_kept_unless_forced(tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    target.write_bytes(b"mine")
    with pytest.raises(DownloadError, match=r"other content"):
        client(Script(listing(), ranged)).download("job_1", tmp_path)
    assert target.read_bytes() == b"mine"
    client(Script(listing(), ranged)).download("job_1", tmp_path, force=True)
    assert target.read_bytes() == CONTENT


def test_a_file_that_is_already_there_is_not_fetched_again(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(CONTENT)
    script = Script(listing(), ranged)
    client(script).download("job_1", tmp_path)
    assert len(script.requests) == 1


def test_an_empty_file_is_downloaded_too(tmp_path: Path) -> None:
    empty = hashlib.sha256(b"").hexdigest()
    client(Script(listing(sha=empty, size=0), httpx.Response(200))).download("job_1", tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b""


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "", "a\\..\\x", "a\0b", "."])
def test_a_path_out_of_the_folder_is_refused_whatever_the_server_says(path: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="leave"):
        client(Script(listing(path), ranged)).download("job_1", tmp_path / "in")
    assert not (tmp_path / "in").exists()


def test_a_job_without_files_says_so(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="no files"):
        client(Script(httpx.Response(200, json={"data": []}))).download("job_1", tmp_path)
