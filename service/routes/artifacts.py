"""The files of a job over HTTP: published artifacts, the report made from them, and the logs of its attempts.

Refuses paths: an artifact is found by looking its stored path up in the database, a log by number, so that no
request can name a file of its own choice.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from jobs.errors import UnknownArtifact
from jobs.layout import attempt_dir, job_dir, rank_log, runner_log
from jobs.records import ArtifactRecord
from service.context import Context
from service.problems import Refusal
from service.routes.jobs import accepts
from service.wire import Artifact, ArtifactList

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["files"])

REPORT_JSON = "report/report.json"
REPORT_HTML = "report/report.html"
#: A log is read from its end, and never more than this many bytes of it.
MAX_LOG_BYTES = 1 << 20
#: The report page is one file: it may draw, and it may not load or send anything.
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"

_ONE_RANGE = re.compile(r"bytes=([0-9]{1,18})?-([0-9]{1,18})?")


class ArtifactResponse(FileResponse):
    """A file whose ETag is its sha256; answers one byte range or, when `ranged` is off, the whole file."""

    def __init__(self, path: Path, record: ArtifactRecord, *, ranged: bool) -> None:
        headers = {
            "ETag": f'"{record.sha256}"',
            "Cache-Control": "private, no-cache",
            "X-Content-Type-Options": "nosniff",
        }
        super().__init__(path, headers=headers, filename=record.path.rpartition("/")[2], stat_result=path.stat())
        self.ranged = ranged

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry; hides a Range header that is not to be followed."""
        if not self.ranged:
            scope = {**scope, "headers": [(k, v) for k, v in scope["headers"] if k != b"range"]}
        await super().__call__(scope, receive, send)


@router.get("/artifacts", response_model=ArtifactList, operation_id="list_artifacts")
def list_artifacts(context: Context, job_id: str) -> ArtifactList:
    """Every published file with its size and sha256; empty before the job succeeded."""
    return ArtifactList(data=[Artifact.of(record) for record in context.store.artifacts(job_id)])


@router.head("/artifacts/{path:path}", response_class=Response, operation_id="head_artifact")
@router.get("/artifacts/{path:path}", response_class=FileResponse, operation_id="get_artifact")
def get_artifact(request: Request, context: Context, job_id: str, path: str) -> Response:
    """One published file, with `Range`, a strong ETag (its sha256) and `If-None-Match`."""
    record = context.store.artifact(job_id, path)
    etag = f'"{record.sha256}"'
    if _matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers={"ETag": etag, "Cache-Control": "private, no-cache"})
    blob = context.blobs.path(record.sha256)
    return ArtifactResponse(blob, record, ranged=_wants_range(request, record.size, etag))


@router.get(
    "/report",
    operation_id="job_report",
    response_class=Response,
    responses={200: {"content": {"application/json": {}, "text/html": {}}}},
)
def job_report(request: Request, context: Context, job_id: str) -> Response:
    """Perplexities, sizes, times and samples; as a page with plots with `Accept: text/html`."""
    as_page = accepts(request, "text/html")
    try:
        record = context.store.artifact(job_id, REPORT_HTML if as_page else REPORT_JSON)
    except UnknownArtifact:
        status = context.store.get(job_id).status
        raise Refusal(
            "no_report", f"job {job_id} is {status} and has no report", "there is one when it has succeeded"
        ) from None
    content = context.blobs.path(record.sha256).read_bytes()
    headers = {"Vary": "Accept", "X-Content-Type-Options": "nosniff", "ETag": f'"{record.sha256}"'}
    if as_page:
        return Response(content, media_type="text/html", headers=headers | {"Content-Security-Policy": REPORT_POLICY})
    return Response(content, media_type="application/json", headers=headers)


@router.get("/logs", operation_id="job_logs", response_class=PlainTextResponse)
def job_logs(
    context: Context,
    job_id: str,
    rank: Annotated[str, Query(pattern=r"^(runner|[0-9]{1,4})$", description="A rank's number, or `runner`.")] = "0",
    tail: Annotated[int, Query(ge=1, le=10_000, description="Lines from the end.")] = 200,
    attempt: Annotated[int | None, Query(ge=1, le=10**6, description="Default: the latest.")] = None,
) -> PlainTextResponse:
    """The end of one process's log."""
    job = context.store.get(job_id)
    number = job.attempt if attempt is None else attempt
    folder = attempt_dir(job_dir(context.settings.data_dir, job.id), number)
    path = runner_log(folder) if rank == "runner" else rank_log(folder, int(rank))
    try:
        text = _last_lines(path, tail)
    except FileNotFoundError:
        who = "the runner" if rank == "runner" else f"rank {rank}"
        hint = "the job has not started yet" if job.attempt == 0 else f"attempts so far: {job.attempt}"
        raise Refusal("no_logs", f"{who} has written no log in attempt {number}", hint) from None
    return PlainTextResponse(text, headers={"X-Content-Type-Options": "nosniff"})


def _matches(header: str | None, etag: str) -> bool:
    """Weak comparison of If-None-Match, as RFC 9110 wants it."""
    if header is None:
        return False
    return any(tag.strip() in ("*", etag, f"W/{etag}") for tag in header.split(","))


def _wants_range(request: Request, size: int, etag: str) -> bool:
    """Whether to answer with one range; several, malformed or outdated (If-Range) ones get the whole file.

    Raises:
        Refusal: The range starts behind the end.
    """
    match = _ONE_RANGE.fullmatch(request.headers.get("range", ""))
    if request.method != "GET" or match is None or request.headers.get("if-range", etag) != etag:
        return False
    first, last = match.groups()
    if first is None and last is None:
        return False
    if first is not None and last is not None and int(last) < int(first):
        return False
    if (int(first) if first is not None else 0) >= size or (first is None and int(last or 0) == 0):
        raise Refusal(
            "range_not_satisfiable",
            f"the range starts behind the end of the file, which has {size} bytes",
            headers={"Content-Range": f"bytes */{size}"},
        )
    return True


def _last_lines(path: Path, count: int) -> str:
    """The last `count` lines of a file, from at most its last MAX_LOG_BYTES; broken UTF-8 is replaced."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        start = max(0, size - MAX_LOG_BYTES)
        file.seek(start)
        lines = file.read(size - start).decode("utf-8", "replace").split("\n")
    ends_with_newline = lines[-1] == ""
    return "\n".join(lines[-(count + ends_with_newline) :])
