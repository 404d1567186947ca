"""The schema's history against the schema."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, text

from jobs.errors import SchemaMismatch
from jobs.schema import metadata
from jobs.store import Store


def test_the_migrations_make_exactly_the_tables_of_the_program(empty_database):
    with create_engine(f"sqlite:///{empty_database}").connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_opening_twice_keeps_what_is_there(tmp_path, spec):
    url = f"sqlite:///{tmp_path}/new/folder/kbop.db"
    job = Store.open(url).submit(spec()).job
    assert Store.open(url).get(job.id) == job


def test_two_processes_that_open_a_new_database_at_once_both_succeed(tmp_path):
    url = f"sqlite:///{tmp_path}/kbop.db"
    with ThreadPoolExecutor(2) as pool:
        for store in pool.map(lambda _: Store.open(url), range(2)):
            store.ping()


def test_a_database_of_a_newer_program_is_refused(tmp_path):
    url = f"sqlite:///{tmp_path}/kbop.db"
    Store.open(url)
    with create_engine(url).begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(SchemaMismatch, match="another version"):
        Store.open(url)
