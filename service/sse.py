"""Server-Sent Events on both ends: the stream of one job's events, and the parser the client reads it with.

Refuses to hold state: a stream is a loop over the store, so that it can start behind any event id in any
process.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

# The client reads streams too and has no use for the server's libraries, so those are imported where they are
# used.
if TYPE_CHECKING:
    from sse_starlette import EventSourceResponse, ServerSentEvent

    from jobs.records import EventRecord, JobRecord
    from jobs.store import Store

POLL_S = 0.25
BATCH = 500
HEARTBEAT_S = 15


@dataclass(frozen=True)
class SseMessage:
    """One message of a stream, as the client sees it."""

    id: str
    event: str
    data: str


def parse_stream(chunks: Iterable[bytes]) -> Iterator[SseMessage]:
    """Messages of a byte stream, by the rules of the HTML standard; comments and unknown fields are skipped.

    Lines end with LF, CRLF or CR+LF split over chunks (our server writes CRLF); a message cut off by the end
    of the stream is dropped. Splitting by bytes matters: `str.splitlines` would also break inside a JSON
    string at U+2028.
    """
    buffer = b""
    last_id, event, data = "", "", list[str]()
    for chunk in chunks:
        *lines, buffer = (buffer + chunk).split(b"\n")
        for raw in lines:
            line = raw.removesuffix(b"\r").decode("utf-8", "replace")
            if not line:
                if data:
                    yield SseMessage(last_id, event or "message", "\n".join(data))
                event, data = "", []
                continue
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "data":
                data.append(value)
            elif name == "event":
                event = value
            elif name == "id":
                last_id = value


def stream_response(store: Store, job_id: str, after: int) -> EventSourceResponse:
    """The events of a job behind `after` as they come, with heartbeat comments, ending with `done`.

    The library behind it ends the stream when the server is told to stop, so that watchers do not hold it up.
    """
    from sse_starlette import EventSourceResponse

    return EventSourceResponse(_messages(store, job_id, after), ping=HEARTBEAT_S)


async def _messages(store: Store, job_id: str, after: int) -> AsyncIterator[ServerSentEvent]:
    from anyio import sleep
    from sse_starlette import ServerSentEvent
    from starlette.concurrency import run_in_threadpool

    from service.wire import Event, Job

    while True:
        job, events, artifacts = await run_in_threadpool(_look, store, job_id, after)
        for event in events:
            after = event.id
            data = Event.of(event).model_dump_json(ensure_ascii=True)
            yield ServerSentEvent(data, event=event.kind, id=str(event.id))
        if job.status.terminal and len(events) < BATCH:
            yield ServerSentEvent(Job.of(job, artifacts).model_dump_json(ensure_ascii=True), event="done")
            return
        if not events:
            await sleep(POLL_S)


def _look(store: Store, job_id: str, after: int) -> tuple[JobRecord, list[EventRecord], int]:
    """The job first and its events second: an end that the job shows is then among the events for sure."""
    job = store.get(job_id)
    events = store.events(job_id, after, BATCH)
    artifacts = store.artifact_counts([job_id])[job_id] if job.status.terminal else 0
    return job, events, artifacts
