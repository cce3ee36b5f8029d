"""One small file per algorithm; the maths they share is in advantages.py, losses.py and mismatch.py.

To add one: a subclass of base.Algorithm here and a line in OPTIONS (rlswitch/run.py). A variant of an
existing one needs no Python, only a YAML file in conf/algorithm/.
"""
