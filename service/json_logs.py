"""How the server writes its log: one JSON object per line on stderr, with the request's id.

Refuses to log secrets: it is given event names and plain values, never headers, bodies or settings objects.
"""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.typing import Processor


def configure_json_logs(level: int = logging.INFO) -> None:
    """Send structlog and the standard library's log (uvicorn, alembic, jobs) through one JSON renderer."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        # Not `dict_tracebacks`: it prints local variables, and one of them could hold a key.
        structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False)),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(default=str),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # httpx and alembic announce every call at INFO, which drowns the server's own lines.
    for name in ("httpx", "alembic", "sse_starlette"):
        logging.getLogger(name).setLevel(logging.WARNING)
