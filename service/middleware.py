"""What wraps every request: its id, its log line, the limit of its body, and the answer when our code breaks.

Refuses to know routes: it sees ASGI messages only, and never logs headers or bodies.
"""

from __future__ import annotations

import re
import time
import uuid

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.problems import body_too_large, internal_error

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

log = structlog.get_logger("service.request")


def request_id_from(headers: Headers) -> str:
    """The caller's `X-Request-Id` when it is safe to echo and to log, else a new one."""
    given = headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex[:16]}"


class RequestContext:
    """Gives each request an id, writes one log line for it, and answers an unexpected exception with a 500.

    The id is in `scope["state"]["request_id"]`, in the answer's `X-Request-Id` and in the log lines between.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = request_id_from(Headers(scope=scope))
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.monotonic()
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self.app(scope, receive, send_with_id)
            except Exception:
                log.exception("request_failed", method=scope["method"], path=scope["path"])
                # Once a status line is out, a second one would corrupt the stream: the connection is closed
                # instead.
                if status is not None:
                    raise
                await internal_error(scope)(scope, receive, send_with_id)
            finally:
                took_ms = round(1000 * (time.monotonic() - started), 1)
                log.info("request", method=scope["method"], path=scope["path"], status=status, duration_ms=took_ms)


class BodyLimit:
    """Refuses bodies above a size: by `Content-Length` at once, by counting when they come in chunks."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and (len(declared) > 18 or int(declared) > self.max_bytes):
            await body_too_large(scope, self.max_bytes)(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.max_bytes:
                raise HTTPException(413, f"the body is larger than the limit of {self.max_bytes} bytes")
            return message

        await self.app(scope, counted, send)
