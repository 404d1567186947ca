"""The stages of a job that ranks run: one file each, in the order prepare, init, train, pack, evaluate.

A stage takes a `Workspace`, reads what earlier stages left, writes its own output and returns facts for its marker.
It may be run again after a crash at any point.
"""
