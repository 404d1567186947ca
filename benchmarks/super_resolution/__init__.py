"""`make bench-super-resolution`: KBOP on convolutions. Learn to enlarge images (T91 → Set5, Set14), weights one bit.

`images.py` what is seen and how it is scored, `network.py` the network, `methods.py` what the rows are, `training.py`
one run, `runs.py` all runs and the choice of learning rates, `table.py` rows and claims, `__main__.py` the command.
"""
