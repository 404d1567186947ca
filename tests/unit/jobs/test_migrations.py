"""The schema's history against the schema."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, text

from jobs.errors import SchemaMismatch
from jobs.schema import metadata
from jobs.spec import JobSpec
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


@pytest.mark.parametrize(
    ("status", "stored", "now"),
    [
        ("queued", {}, {"scale_lr": 0.01, "other_lr": 0.02, "blockwise_steps": None}),
        ("running", {"effort": "quick"}, {"scale_lr": 0.01, "other_lr": 0.02, "blockwise_steps": None}),
        ("queued", {"scale_lr": 0.5, "blockwise_steps": 7}, {"scale_lr": 0.5, "other_lr": 0.02, "blockwise_steps": 7}),
        ("succeeded", {}, {"scale_lr": 0.003, "other_lr": 0.003, "blockwise_steps": 400}),
    ],
)
def test_a_waiting_job_gets_todays_meaning_of_the_defaults_it_was_stored_with(tmp_path, spec, status, stored, now):
    url = f"sqlite:///{tmp_path}/kbop.db"
    store = Store.open(url)
    job = store.submit(spec()).job
    method = {"effort": "standard", "scale_lr": 0.003, "other_lr": 0.003, "blockwise_steps": 400} | stored
    with create_engine(url).begin() as connection:
        changed = {"spec": json.dumps(job.spec | {"method": method}), "status": status}
        connection.execute(text("UPDATE jobs SET spec = :spec, status = :status"), changed)
        connection.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    found = Store.open(url).get(job.id).spec
    assert {field: found["method"][field] for field in now} == now
    if status != "succeeded":
        JobSpec.model_validate(found)
