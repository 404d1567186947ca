"""The HTTP application: routes, middleware and error answers put together.

Refuses to run anything: the caller brings an open store, and runs the scheduler and the server process.
"""

from __future__ import annotations

from typing import Any

from fastapi import Depends, FastAPI
from fastapi.openapi.utils import get_openapi
from prometheus_client import CollectorRegistry, disable_created_metrics

from jobs.artifacts import ArtifactStore
from jobs.layout import artifacts_dir
from jobs.sources import SourcePolicy
from jobs.spec import JobSpec
from jobs.store import Store
from service import problems
from service.context import ServerContext, require_key
from service.exporter import StoreCollector
from service.middleware import BodyLimit, RequestContext
from service.request_metrics import RequestMetrics
from service.routes import artifacts, health, jobs, metrics
from service.routes.health import package_version
from service.settings import ServerSettings
from service.wire import Problem

ERROR_ANSWERS: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "Any error, as an RFC 9457 problem.",
        "content": {problems.MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
}


def source_policy(settings: ServerSettings) -> SourcePolicy:
    """Which models and data the settings allow."""
    return SourcePolicy(
        model_roots=settings.model_roots, data_roots=settings.data_roots, hub_owners=settings.hub_owners
    )


def create_app(settings: ServerSettings, store: Store, devices: tuple[str, ...] | None = None) -> FastAPI:
    """The application.

    Args:
        settings: The server's settings.
        store: An open store.
        devices: Names of the devices jobs can get; None when another process schedules and only it knows:
            jobs that are too large are then not refused, but wait and say why.
    """
    app = FastAPI(title="KBOP", version=package_version(), redirect_slashes=False, responses=ERROR_ANSWERS)
    app.state.context = ServerContext(
        settings=settings,
        store=store,
        blobs=ArtifactStore(artifacts_dir(settings.data_dir)),
        policy=source_policy(settings),
        devices=devices,
    )
    app.state.metrics = _metrics(store, devices)
    problems.install(app)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(RequestContext)
    app.add_middleware(RequestMetrics, registry=app.state.metrics)
    app.include_router(health.router)
    for router in (jobs.router, artifacts.router, metrics.router):
        app.include_router(router, dependencies=[Depends(require_key)])
    _document_bodies(app)
    return app


def _metrics(store: Store, devices: tuple[str, ...] | None) -> CollectorRegistry:
    """A registry of this application's own: the library's global one would mix the requests of several."""
    disable_created_metrics()  # type: ignore[no-untyped-call] # the text format has no place for them
    registry = CollectorRegistry()
    registry.register(StoreCollector(store, None if devices is None else len(devices), package_version()))
    return registry


def _document_bodies(app: FastAPI) -> None:
    """Adds what no route declares as a type, the schemas of the spec and of problems, to the OpenAPI page."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            page = get_openapi(title=app.title, version=app.version, routes=app.routes)
            schemas = page.setdefault("components", {}).setdefault("schemas", {})
            for model in (JobSpec, Problem):
                schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas |= schema.pop("$defs", {}) | {model.__name__: schema}
            app.openapi_schema = page
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
