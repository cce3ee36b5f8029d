"""One small file per algorithm; the maths they share is in advantages.py, losses.py and kl.py.

To add one: a dataclass here that fills in algorithms/base.py, and a line in OPTIONS (rlswitch/run.py).
A variant of an existing one needs no Python: a YAML file in conf/algorithm/.
"""
