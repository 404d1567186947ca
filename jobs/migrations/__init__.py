"""Schema history, applied by `jobs.database.Database.upgrade`; refuses to import the running program."""
