"""`make bench-scaling`: what the sharded state holds, sends and costs on several ranks. Start at `__main__.py`."""
