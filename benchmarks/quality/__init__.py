"""Quality per bit: all methods under the same conversion, data, tokens, loss and evaluation (`make bench-quality`).

tasks.py says on what, methods.py what competes, training.py how each is trained, suites.py which runs make a table,
store.py keeps finished runs, tables.py and plots.py turn them into docs/quality.md.
"""
