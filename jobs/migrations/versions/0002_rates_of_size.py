"""Jobs that wait with the defaults of before learning rates were shares of sizes get today's.

0.003 was an absolute rate and would now be read as 0.3 % of a tensor's size; blockwise_steps had one number for all
effort levels. Values that somebody chose stay, and so does what finished jobs ran with.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

#: Field of `method` → (default then, default now).
_DEFAULTS = {"scale_lr": (0.003, 0.01), "other_lr": (0.003, 0.02), "blockwise_steps": (400, None)}
_FINISHED = ("succeeded", "failed", "cancelled")


def upgrade() -> None:
    """Rewrite the specs."""
    jobs = sa.table("jobs", sa.column("id", sa.String), sa.column("status", sa.String), sa.column("spec", sa.JSON))
    connection = op.get_bind()
    waiting = sa.select(jobs.c.id, jobs.c.spec).where(jobs.c.status.not_in(_FINISHED))
    for job_id, spec in connection.execute(waiting).all():
        method = dict(spec.get("method") or {})
        method |= {field: now for field, (then, now) in _DEFAULTS.items() if method.get(field) == then}
        connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(spec=spec | {"method": method}))
