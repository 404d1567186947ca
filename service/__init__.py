"""The HTTP face of KBOP: the FastAPI server, its Python client and the `kbop` command.

Refuses to compute: nothing in here imports torch, numpy or `kbop_core`; the work happens in `jobs`.
"""
