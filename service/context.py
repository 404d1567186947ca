"""What every route needs: the settings, the store, the artifact folder and what this server may run.

Refuses to do anything by itself: routes call its parts.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from jobs.artifacts import ArtifactStore
from jobs.sources import SourcePolicy
from jobs.store import Store
from service.problems import Refusal
from service.settings import ServerSettings

_bearer = HTTPBearer(auto_error=False, description="The API key, when the server has one.")


@dataclass(frozen=True)
class ServerContext:
    """The parts of one server.

    Attributes:
        settings: The server's settings.
        store: Jobs, events and artifact records.
        blobs: The artifacts' bytes.
        policy: Which models and data may be used.
        devices: Names of the devices a job can get; None when another process schedules and only it knows.
    """

    settings: ServerSettings
    store: Store
    blobs: ArtifactStore
    policy: SourcePolicy
    devices: tuple[str, ...] | None


def server_context(request: Request) -> ServerContext:
    """The context `create_app` left in the application."""
    context: ServerContext = request.app.state.context
    return context


Context = Annotated[ServerContext, Depends(server_context)]


async def require_key(
    context: Context, given: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
) -> None:
    """Lets a request through when the server has no key or the request carries it."""
    key = context.settings.api_key
    if key is None:
        return
    sent = given.credentials.encode() if given is not None else b""
    # Compared in constant time: the time of the answer must not tell how many characters were right.
    if not hmac.compare_digest(sent, key.get_secret_value().encode()):
        raise Refusal(
            "unauthorized",
            "the API key is wrong" if given is not None else "the request carries no API key",
            "send `Authorization: Bearer KEY`; the kbop command takes it from KBOP_API_KEY",
            headers={"WWW-Authenticate": "Bearer"},
        )
