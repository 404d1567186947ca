"""The database connection: engine, read and write transactions, the upgrade to the newest schema.

Refuses to know any query: it hands out connections inside transactions and takes them back.

SQLite is the embedded default. Its driver's own transaction handling is switched off, because WAL with a busy
timeout still fails when a transaction that began by reading wants to write: writers say BEGIN IMMEDIATE from
the start.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import InterfaceError, OperationalError, TimeoutError

from jobs.errors import SchemaMismatch, StoreUnavailable

_WRITES = "kbop_writes"
_BUSY_TIMEOUT_MS = 10_000


class Database:
    """One database, shared by the threads of a process.

    Args:
        url: SQLAlchemy URL. A SQLite one must name a file (in memory, each connection would have a database
            of its own).
    """

    def __init__(self, url: str) -> None:
        parsed = make_url(url)
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        if self.is_sqlite and parsed.database in (None, "", ":memory:"):
            raise ValueError(f"database URL {url!r} names no file: use sqlite:////absolute/path/kbop.db")
        self._file = Path(parsed.database or "") if self.is_sqlite else None
        self._engine = create_engine(parsed)
        if self.is_sqlite:
            _use_explicit_transactions(self._engine)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent view; nothing is committed."""
        with self._transaction(writes=False) as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A writing transaction: committed when the block ends, rolled back when it raises."""
        with self._transaction(writes=True) as connection:
            yield connection

    @contextmanager
    def _transaction(self, writes: bool) -> Iterator[Connection]:
        try:
            with self._engine.connect() as connection:
                connection.execution_options(**{_WRITES: writes})
                with connection.begin():
                    yield connection
        except (OperationalError, InterfaceError, TimeoutError) as error:
            reason = getattr(error, "orig", None) or error
            hint = "see that it runs and its disk has room, then try again"
            raise StoreUnavailable(f"the database does not answer: {reason}", hint) from error

    def upgrade(self) -> None:
        """Bring the schema to this program's version; several processes may call it at once."""
        from alembic import command
        from alembic.util import CommandError

        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
        config = _alembic_config()
        with self.write() as connection:
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except CommandError as error:
                raise SchemaMismatch(
                    f"the database was made by another version of this program: {error}",
                    "update this program",
                ) from error

    def check(self) -> None:
        """Raise StoreUnavailable or SchemaMismatch unless the database answers with this program's schema."""
        with self.read() as connection:
            found = None
            if inspect(connection).has_table("alembic_version"):
                found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
        if found != head_revision():
            raise SchemaMismatch(
                f"the database has schema {found or 'none'}, this program needs {head_revision()}",
                "start `kbop serve` once to upgrade it, or update this program",
            )

    def close(self) -> None:
        """Close the pooled connections."""
        self._engine.dispose()


def _use_explicit_transactions(engine: Engine) -> None:
    """SQLite: durable settings on every connection, and BEGIN said by us."""

    @event.listens_for(engine, "connect")
    def on_connect(raw: Any, _record: Any) -> None:
        raw.isolation_level = None
        for pragma in (
            f"busy_timeout={_BUSY_TIMEOUT_MS}",
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
        ):
            raw.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def on_begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get(_WRITES, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _alembic_config() -> Any:
    """Alembic's configuration without an alembic.ini, so that it works from an installed wheel."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    return config


@functools.cache
def head_revision() -> str:
    """The schema revision this program works with."""
    from alembic.script import ScriptDirectory

    head = ScriptDirectory.from_config(_alembic_config()).get_current_head()
    if head is None:
        raise RuntimeError("jobs/migrations holds no revision: the installation is incomplete")
    return head
