"""How alembic reaches the database: through its caller's connection, inside its caller's transaction.

Refuses to open a connection of its own, so that two processes upgrading at once wait for each other.
"""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
with context.begin_transaction():
    context.run_migrations()
