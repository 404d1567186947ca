"""Whether the server lives and whether it can take work; open to everybody, with or without a key.

Refuses to tell more than that: no paths, no job names.
"""

from __future__ import annotations

import functools
import shutil
import time
from importlib.metadata import PackageNotFoundError, version

import structlog
from fastapi import APIRouter

from jobs.errors import JobsError
from jobs.scheduler import last_tick
from service.context import Context, ServerContext
from service.problems import Refusal
from service.wire import Health, Readiness

log = structlog.get_logger("service.health")

#: A tick takes well under a second; starting a runner on a busy machine may take a few.
STALE_TICK_S = 15.0

router = APIRouter(tags=["health"])


@functools.cache
def package_version() -> str:
    """The installed version of kbop; `unknown` in a source tree that was never installed."""
    try:
        return version("kbop")
    except PackageNotFoundError:
        return "unknown"


def database_trouble(context: ServerContext) -> str | None:
    """What is wrong with the database, if anything."""
    try:
        context.store.ping()
    except JobsError as error:
        # The message may name hosts and users, and anybody may ask here: it goes to the log only.
        log.error("database_not_ready", code=error.code, message=error.message)
        return error.code
    return None


def scheduler_trouble(context: ServerContext) -> str | None:
    """What is wrong with the scheduler, if it is this server's to run."""
    if not context.settings.embed_scheduler:
        return None
    ticked = last_tick(context.settings.data_dir)
    age_s = None if ticked is None else time.time() - ticked
    if age_s is not None and age_s < STALE_TICK_S:
        return None
    return "it has not ticked yet" if age_s is None else f"its last tick was {age_s:.0f} s ago"


def disk_trouble(context: ServerContext) -> str | None:
    """What is wrong with the disk under the data directory, if anything."""
    floor = context.settings.disk_floor_bytes
    try:
        free = shutil.disk_usage(context.settings.data_dir).free
    except OSError as error:
        return f"the data directory cannot be read: {error.strerror}"
    return None if free >= floor else f"{free} bytes are free, fewer than the floor of {floor}"


@router.get("/healthz", response_model=Health, operation_id="health")
async def health() -> Health:
    """The process answers."""
    return Health(version=package_version())


@router.get("/readyz", response_model=Readiness, operation_id="readiness")
def readiness(context: Context) -> Readiness:
    """Whether work can be taken; 503 when not.

    That is: the database has this program's schema, the scheduler (if here) ticks, the disk is above its
    floor.
    """
    troubles = {
        "database": database_trouble(context),
        "scheduler": scheduler_trouble(context),
        "disk": disk_trouble(context),
    }
    checks = {part: trouble or "ok" for part, trouble in troubles.items()}
    wrong = [f"{part}: {trouble}" for part, trouble in troubles.items() if trouble]
    if wrong:
        raise Refusal("not_ready", "; ".join(wrong), headers={"Retry-After": "2"}, members={"checks": checks})
    return Readiness(checks=checks)
