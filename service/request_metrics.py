"""How many requests there were and how long answers took, by route, for Prometheus.

Refuses to label by what a caller chose: a path counts as the template of its route, an address or method that no
route knows as `other`.
"""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OTHER = "other"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class RequestMetrics:
    """ASGI middleware: counts every answer when it begins.

    Not when it ends: an event stream lasts as long as its job, and would hide what other answers take.
    """

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self.app = app
        self._answers = Counter(
            "kbop_http_requests",
            "Answers by method, route and status.",
            ["method", "route", "status"],
            registry=registry,
        )
        self._seconds = Histogram(
            "kbop_http_request_duration_seconds",
            "Seconds from a request to the beginning of its answer.",
            ["method", "route"],
            registry=registry,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                method, route = _method(scope), _route(scope)
                self._answers.labels(method, route, str(message["status"])).inc()
                self._seconds.labels(method, route).observe(time.monotonic() - started)
            await send(message)

        await self.app(scope, receive, counted)


def _method(scope: Scope) -> str:
    method = str(scope["method"])
    return method if method in METHODS else OTHER


def _route(scope: Scope) -> str:
    """The template the router found for the request, such as `/v1/jobs/{job_id}`."""
    return str(getattr(scope.get("route"), "path_format", OTHER))
