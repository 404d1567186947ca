"""The Python client of the server: submit, follow, cancel, read reports, download with verification.

Refuses to guess: a file that does not match its sha256 is never put in place, and only calls that may be
repeated without harm are repeated.

Errors:
    ClientError
    ├── Unreachable     no answer from the server
    ├── ProblemError    the server answered with a problem (RFC 9457)
    └── DownloadError   a file could not be put in place
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self
from urllib.parse import quote, urlsplit

import httpx

from service.settings import is_loopback
from service.sse import SseMessage, parse_stream

Json = dict[str, Any]
#: Called with an artifact's path, bytes so far and bytes in all.
OnBytes = Callable[[str, int, int], None]

RETRY_WAITS_S = (0.2, 0.4, 0.8)
#: Seconds `watch` tries to reach a server that never answered it: it probably does not run.
FIRST_CONNECTION_S = 2.0
#: The server sends a heartbeat every 15 s; three missed ones mean the connection is dead.
STREAM_SILENCE_S = 45.0


class ClientError(Exception):
    """Base of everything this client raises; `hint` says what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class Unreachable(ClientError):
    """The server did not answer."""


class ProblemError(ClientError):
    """The server refused, with the problem it gave."""

    def __init__(self, status: int, problem: Json) -> None:
        super().__init__(
            str(problem.get("detail") or problem.get("title") or f"HTTP status {status}"),
            str(problem.get("hint") or ""),
        )
        self.status = status
        self.problem = problem
        self.code = str(problem.get("code") or f"http_{status}")


class DownloadError(ClientError):
    """A file could not be downloaded whole, or may not replace what is there."""


@dataclass(frozen=True)
class WatchEvent:
    """One event of a job; the last one has kind `done` and the final job object as data.

    Attributes:
        id: The event's id; 0 for `done`.
        kind: status, stage, progress, note or done.
        data: The wire event, or the wire job for `done`.
    """

    id: int
    kind: str
    data: Json


class _Patience:
    """How long a watcher goes on without a connection: long once it had one, short when it never did."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._limit = min(seconds, FIRST_CONNECTION_S)
        self._lost_since: float | None = None

    def connected(self) -> None:
        self._limit, self._lost_since = self._seconds, None

    def is_over(self) -> bool:
        now = time.monotonic()
        if self._lost_since is None:
            self._lost_since = now
        return now - self._lost_since >= self._limit


class KbopClient:
    """Synchronous client of one server."""

    def __init__(
        self,
        endpoint: str,
        api_key: str | None = None,
        *,
        timeout_s: float = 30.0,
        transport: httpx.BaseTransport | None = None,
        patience_s: float = 60.0,
    ) -> None:
        """Connects lazily.

        Args:
            endpoint: Base URL, such as `http://127.0.0.1:8700`.
            api_key: Bearer token, when the server wants one.
            timeout_s: Seconds to wait for one answer.
            transport: Other transport than the network, for tests.
            patience_s: Seconds `watch` goes on trying to reach a server that went away.
        """
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ClientError(f"{endpoint!r} is not a server address", "give one such as http://127.0.0.1:8700")
        headers = {"Accept-Encoding": "identity", "User-Agent": "kbop-client"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        self.endpoint = endpoint.rstrip("/")
        self._patience_s = patience_s
        # A proxy from the environment cannot reach this machine's own loopback.
        self._http = httpx.Client(
            base_url=self.endpoint,
            headers=headers,
            timeout=timeout_s,
            transport=transport,
            trust_env=not is_loopback(parts.hostname),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def submit(self, spec: Json, *, idempotency_key: str | None = None) -> Json:
        """Submits a job; repeated on lost connections, which the idempotency key makes harmless."""
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        return self._json("POST", "/v1/jobs", json=spec, headers=headers)

    def get(self, job_id: str) -> Json:
        """The job object."""
        return self._json("GET", _job(job_id))

    def list_jobs(self, *, limit: int = 50, cursor: str | None = None, status: str | None = None) -> Json:
        """One page of jobs, newest first: `{data, next_cursor}`."""
        wanted: dict[str, str | int | None] = {"limit": limit, "cursor": cursor, "status": status}
        params = {k: v for k, v in wanted.items() if v is not None}
        return self._json("GET", "/v1/jobs", params=params)

    def cancel(self, job_id: str) -> Json:
        """Asks for cancellation; not repeated once it may have reached the server."""
        return self._json("POST", f"{_job(job_id)}/cancel", repeatable=False)

    def metrics(self, job_id: str, **query: int | bool) -> Json:
        """The training series, `{every, next_since, data}`; `query`: since, until, every, limit, layers."""
        return self._json("GET", f"{_job(job_id)}/metrics", params=query)

    def report(self, job_id: str) -> Json:
        """The report."""
        return self._json("GET", f"{_job(job_id)}/report", headers={"Accept": "application/json"})

    def report_html(self, job_id: str) -> bytes:
        """The report as a self-contained page."""
        return self._request("GET", f"{_job(job_id)}/report", headers={"Accept": "text/html"}).content

    def artifacts(self, job_id: str) -> tuple[Json, ...]:
        """Every published file: path, size, sha256, url."""
        return tuple(self._json("GET", f"{_job(job_id)}/artifacts")["data"])

    def watch(self, job_id: str, *, after: int = 0) -> Iterator[WatchEvent]:
        """Events of a job as they happen, ending with `done`.

        A lost connection is taken up again behind the last event seen, so that none is missed or repeated.

        Args:
            job_id: The job.
            after: Skip events up to this id.

        Raises:
            Unreachable: The server stayed away longer than `patience_s`.
        """
        patience = _Patience(self._patience_s)
        while True:
            lost: Exception | None = None
            try:
                for message in self._stream(job_id, after, patience):
                    event = _watch_event(message)
                    after = max(after, event.id)
                    yield event
                    if event.kind == "done":
                        return
            except (httpx.TransportError, ProblemError) as error:
                if isinstance(error, ProblemError) and error.status < 500:
                    raise
                lost = error
            if patience.is_over():
                raise self._unreachable(lost) from lost
            time.sleep(RETRY_WAITS_S[-1])

    def download(
        self, job_id: str, folder: Path, *, force: bool = False, on_bytes: OnBytes | None = None
    ) -> list[Path]:
        """Puts every published file under `folder`; partial files are resumed, whole ones verified and kept.

        Raises:
            DownloadError: A different file is in the way and `force` is off (nothing is written then), or a
                file's bytes do not match its sha256 (it is not put in place).
        """
        files = [(a, _target(folder, a["path"])) for a in self.artifacts(job_id)]
        if not files:
            raise DownloadError(f"job {job_id} has published no files", "wait until its status is `succeeded`")
        todo = [(a, target) for a, target in files if not _is_there(target, a)]
        in_the_way = [str(target) for _, target in todo if os.path.lexists(target)]
        if in_the_way and not force:
            raise DownloadError(
                f"{', '.join(in_the_way)} is there already with other content",
                "choose another folder, or overwrite with --force",
            )
        for artifact, target in todo:
            self._download_one(artifact, target, on_bytes)
        return [target for _, target in files]

    def _download_one(self, artifact: Json, target: Path, on_bytes: OnBytes | None) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        # The hash in the name keeps a part of one version from being taken for a part of another.
        part = target.with_name(f".{target.name}.{artifact['sha256'][:16]}.part")
        failures, had = 0, -1
        while True:
            try:
                self._fill(part, artifact, on_bytes)
                break
            except httpx.TransportError as error:
                have = part.stat().st_size if part.exists() else 0
                # A connection that breaks again and again but brings bytes each time is worth going on with.
                failures, had = (0 if have > had else failures + 1), have
                if failures == len(RETRY_WAITS_S):
                    raise self._unreachable(error) from error
                time.sleep(RETRY_WAITS_S[failures])
        if part.stat().st_size != artifact["size"] or _sha256(part) != artifact["sha256"]:
            part.unlink()
            raise DownloadError(
                f"{artifact['path']} arrived with other bytes than its sha256 says; it was thrown away",
                "run the same command again; if it happens again, the server's disk may be damaged",
            )
        part.replace(target)

    def _fill(self, part: Path, artifact: Json, on_bytes: OnBytes | None) -> None:
        """Brings `part` to its full length, from where it stands if the server still has the same file."""
        have = part.stat().st_size if part.exists() else 0
        size = artifact["size"]
        if have > size:
            have = 0
        if 0 < have == size:
            return
        headers = {"Range": f"bytes={have}-", "If-Range": f'"{artifact["sha256"]}"'} if have else {}
        with self._http.stream("GET", artifact["url"], headers=headers) as response:
            _raise_for_problem(response)
            resumed = response.status_code == 206
            done = have if resumed else 0
            with part.open("ab" if resumed else "wb") as out:
                for chunk in response.iter_raw():
                    out.write(chunk)
                    done += len(chunk)
                    if on_bytes:
                        on_bytes(artifact["path"], done, size)
                out.flush()
                os.fsync(out.fileno())

    def _stream(self, job_id: str, after: int, patience: _Patience) -> Iterator[SseMessage]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        timeout = httpx.Timeout(self._http.timeout.connect, read=STREAM_SILENCE_S)
        with self._http.stream("GET", f"{_job(job_id)}/events", headers=headers, timeout=timeout) as response:
            _raise_for_problem(response)
            patience.connected()
            yield from parse_stream(response.iter_raw())

    def _json(self, method: str, path: str, *, repeatable: bool = True, **kwargs: Any) -> Json:
        response = self._request(method, path, repeatable=repeatable, **kwargs)
        try:
            value = response.json()
        except ValueError as error:
            raise ClientError(
                f"{self.endpoint} answered {method} {path} with something that is not JSON",
                "is another program listening on that port?",
            ) from error
        return dict(value)

    def _request(self, method: str, path: str, *, repeatable: bool = True, **kwargs: Any) -> httpx.Response:
        for wait_s in (*RETRY_WAITS_S, None):
            try:
                response = self._http.request(method, path, **kwargs)
            except httpx.TransportError as error:
                # Without a connection nothing reached the server, so even a call with effects may be
                # repeated.
                if wait_s is None or not (repeatable or isinstance(error, httpx.ConnectError)):
                    raise self._unreachable(error) from error
            else:
                if response.status_code < 500 or wait_s is None or not repeatable:
                    _raise_for_problem(response)
                    return response
            time.sleep(wait_s)
        raise AssertionError("the last turn returns or raises")

    def _unreachable(self, cause: Exception | None) -> Unreachable:
        reason = f" ({cause})" if cause and str(cause) else ""
        return Unreachable(
            f"no answer from {self.endpoint}{reason}",
            "start a server with `kbop serve`, or point --endpoint or KBOP_ENDPOINT at the one that runs",
        )


def _job(job_id: str) -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}"


def _watch_event(message: SseMessage) -> WatchEvent:
    number = int(message.id) if message.id and message.event != "done" else 0
    return WatchEvent(number, message.event, json.loads(message.data))


def _raise_for_problem(response: httpx.Response) -> None:
    if response.status_code < 400:
        return
    response.read()
    problem: Mapping[str, Any] = {}
    try:
        body = response.json()
        problem = body if isinstance(body, dict) else {}
    except ValueError:
        pass
    raise ProblemError(response.status_code, dict(problem))


def _target(folder: Path, path: str) -> Path:
    """Where an artifact goes; a path that would leave the folder is refused, whatever the server says."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or not pure.parts or ".." in pure.parts or "\\" in path or "\0" in path:
        raise DownloadError(f"the server named a file {path!r}, which would leave {folder}", "do not trust this server")
    return folder.joinpath(*pure.parts)


def _is_there(target: Path, artifact: Json) -> bool:
    if not target.is_file() or target.stat().st_size != artifact["size"]:
        return False
    return _sha256(target) == str(artifact["sha256"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
