"""Owns the demo's text and teacher: both come from this repository, so that the demo needs no network.

Refuses to be needed by any other job: nothing outside the `builtin:` sources looks in here.
"""
