"""Every error answer: the table from domain errors to HTTP, the codes HTTP adds, their RFC 9457 form.

Refuses to show what a client should not see: an unexpected exception becomes a 500 with a request id only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Scope

from jobs import errors as domain
from service.spec_errors import explain, pointer_of

MEDIA_TYPE = "application/problem+json"

log = structlog.get_logger("service.problems")

#: HTTP status and title of every class in `jobs.errors`. A test fails when one is missing.
DOMAIN_PROBLEMS: dict[type[domain.JobsError], tuple[int, str]] = {
    domain.JobsError: (500, "The job system failed"),
    domain.SubmitError: (422, "The job was refused"),
    domain.IdempotencyMismatch: (422, "The idempotency key belongs to another request"),
    domain.NotEnoughDevices: (422, "The job needs more devices than there are"),
    domain.BadPlan: (422, "The plan was refused"),
    domain.SourceError: (422, "A source cannot be used"),
    domain.UnknownModel: (422, "The model does not exist"),
    domain.UnknownShape: (422, "The model's sizes are not known"),
    domain.UnknownData: (422, "The data does not exist"),
    domain.PathNotAllowed: (422, "The path is outside the allowed folders"),
    domain.OwnerNotAllowed: (422, "The hub owner is not on the list"),
    domain.PickleWeights: (422, "The weights are pickle files"),
    domain.RemoteCode: (422, "The model wants to run its own code"),
    domain.BadWeights: (422, "The weights cannot be read"),
    domain.BadDataType: (422, "The data has a type that is not read here"),
    domain.EmptyData: (422, "The data is empty"),
    domain.LookupFailed: (404, "Nothing has that name"),
    domain.UnknownJob: (404, "No such job"),
    domain.UnknownArtifact: (404, "No such artifact"),
    domain.BadCursor: (400, "The cursor is not valid"),
    domain.StateError: (409, "The job's state does not allow this"),
    domain.AlreadyFinished: (409, "The job has finished"),
    domain.IllegalTransition: (500, "The job system tried an impossible change"),
    domain.LeaseLost: (500, "The attempt lost its lease"),
    domain.StorageError: (500, "Files could not be stored or read"),
    domain.DiskFull: (507, "The disk is full"),
    domain.HashMismatch: (500, "A stored file is damaged"),
    domain.BadManifest: (500, "A checkpoint's manifest is wrong"),
    domain.BlobMissing: (500, "A stored file is missing"),
    domain.ClusterError: (500, "The nodes cannot be used"),
    domain.BadHostfile: (500, "The host list is wrong"),
    domain.NodeUnreachable: (500, "A node cannot be reached"),
    domain.FolderNotShared: (500, "A node does not see the data directory"),
    domain.NodeStartFailed: (500, "A node could not start its ranks"),
    domain.NodeLost: (500, "A node stopped answering"),
    domain.StoreUnavailable: (503, "The database does not answer"),
    domain.SchemaMismatch: (503, "The database has another version"),
    domain.SchedulerRunning: (503, "Another scheduler is running"),
}

#: Codes that HTTP adds to those of `jobs.errors`.
HTTP_PROBLEMS: dict[str, tuple[int, str]] = {
    "bad_request": (400, "The request cannot be read"),
    "invalid_json": (400, "The body is not JSON"),
    "invalid_idempotency_key": (400, "The idempotency key is not valid"),
    "invalid_event_id": (400, "The Last-Event-ID is not valid"),
    "unauthorized": (401, "An API key is needed"),
    "unknown_route": (404, "There is nothing at this address"),
    "no_report": (404, "The job has no report"),
    "no_logs": (404, "The job has no such log"),
    "method_not_allowed": (405, "The address does not know this method"),
    "body_too_large": (413, "The body is too large"),
    "unsupported_media_type": (415, "The body has the wrong type"),
    "range_not_satisfiable": (416, "The range is outside the file"),
    "invalid_spec": (422, "The job spec is not valid"),
    "invalid_parameter": (422, "A parameter is not valid"),
    "internal_error": (500, "The server failed"),
    "not_ready": (503, "The server cannot take work"),
}

_BY_STATUS = {
    404: "unknown_route",
    405: "method_not_allowed",
    413: "body_too_large",
    415: "unsupported_media_type",
}

Errors = Sequence[tuple[str, str]]


class RefusedField(Exception):
    """A domain error together with the pointer of the field that caused it."""

    def __init__(self, pointer: str, error: domain.JobsError) -> None:
        super().__init__(f"{pointer}: {error.message}")
        self.pointer = pointer
        self.error = error


def status_and_title(error: domain.JobsError) -> tuple[int, str]:
    """The table's line for an error, or that of its nearest mapped base."""
    return next(DOMAIN_PROBLEMS[cls] for cls in type(error).__mro__ if cls in DOMAIN_PROBLEMS)


@dataclass(frozen=True)
class Details:
    """What is particular to one problem; `errors` holds (JSON pointer, sentence) pairs, `members` further members."""

    detail: str
    hint: str = ""
    errors: Errors = ()
    headers: Mapping[str, str] | None = None
    members: Mapping[str, Any] | None = None


class Refusal(Exception):
    """A request refused by the service itself, with a code of `HTTP_PROBLEMS`."""

    def __init__(
        self,
        code: str,
        detail: str,
        hint: str = "",
        *,
        errors: Errors = (),
        headers: Mapping[str, str] | None = None,
        members: Mapping[str, Any] | None = None,
    ) -> None:
        """As in `Details`."""
        super().__init__(detail)
        self.code = code
        self.details = Details(detail, hint, errors, headers, members)


def problem(scope: Scope, code: str, status_and_title: tuple[int, str], details: Details) -> JSONResponse:
    """The answer in RFC 9457 form."""
    status, title = status_and_title
    content: dict[str, Any] = {
        "type": f"urn:kbop:problem:{code}",
        "title": title,
        "status": status,
        "detail": details.detail,
        "instance": scope["path"],
        "code": code,
        "hint": details.hint or None,
        "request_id": scope["state"]["request_id"],
        "errors": [{"pointer": pointer, "detail": text} for pointer, text in details.errors],
        **(details.members or {}),
    }
    return JSONResponse(content, status, dict(details.headers or {}), MEDIA_TYPE)


def internal_error(scope: Scope) -> JSONResponse:
    """The answer to a bug of ours: nothing but the id under which the log has the rest."""
    detail = "the server hit an unexpected error; its log has the details under this request id"
    return problem(scope, "internal_error", HTTP_PROBLEMS["internal_error"], Details(detail))


def body_too_large(scope: Scope, limit: int) -> JSONResponse:
    """The answer to a declared body above the limit; the connection closes, since the body is not read."""
    details = Details(f"the body is larger than the limit of {limit} bytes", headers={"Connection": "close"})
    return problem(scope, "body_too_large", HTTP_PROBLEMS["body_too_large"], details)


def install(app: FastAPI) -> None:
    """Registers a handler for everything routes may raise on purpose."""
    app.add_exception_handler(domain.JobsError, _on_domain)
    app.add_exception_handler(RefusedField, _on_field)
    app.add_exception_handler(Refusal, _on_refusal)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(RequestValidationError, _on_validation)


async def _on_domain(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, domain.JobsError)
    return _from_domain(request, error)


async def _on_field(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RefusedField)
    return _from_domain(request, error.error, errors=[(error.pointer, error.error.message)])


def _from_domain(request: Request, error: domain.JobsError, errors: Errors = ()) -> JSONResponse:
    status, title = status_and_title(error)
    if status >= 500:
        log.error("domain_error", code=error.code, exc_info=error)
    headers = {"Retry-After": "2"} if status == 503 else None
    details = Details(error.message, error.hint, errors, headers)
    return problem(request.scope, error.code, (status, title), details)


async def _on_refusal(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refusal)
    return problem(request.scope, error.code, HTTP_PROBLEMS[error.code], error.details)


async def _on_http(request: Request, error: Exception) -> JSONResponse:
    """What the framework refuses by itself, and the body limit."""
    assert isinstance(error, HTTPException)
    code = _BY_STATUS.get(error.status_code, "bad_request" if error.status_code < 500 else "internal_error")
    detail, hint = str(error.detail), ""
    if code == "unknown_route":
        detail, hint = f"there is nothing at {request.url.path}", "the routes are listed at /openapi.json"
    elif code == "method_not_allowed":
        detail = f"{request.url.path} does not know {request.method}"
    details = Details(detail, hint, headers=error.headers)
    return problem(request.scope, code, (error.status_code, HTTP_PROBLEMS[code][1]), details)


async def _on_validation(request: Request, error: Exception) -> JSONResponse:
    """Parameters outside the body; the body itself is checked by `spec_errors`."""
    assert isinstance(error, RequestValidationError)
    errors = [(_parameter(d["loc"]), explain(d)) for d in error.errors()]
    details = Details("; ".join(f"{where}: {text}" for where, text in errors), errors=errors)
    return problem(request.scope, "invalid_parameter", HTTP_PROBLEMS["invalid_parameter"], details)


def _parameter(loc: Sequence[int | str]) -> str:
    where, rest = loc[0], loc[1:]
    return f"?{rest[0]}" if where == "query" and rest else pointer_of(loc)
