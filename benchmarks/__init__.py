"""Benchmarks and long checks, run by the programs in scripts/.

Switching: experiment.py repeats the measurements of vLLM's sleep-mode article on this machine, tables.py
summarizes them next to the article's numbers, charts.py plots them. probe.py tests which sleep levels work
with a model; soak.py injects faults into a run; gpu_check.py checks every claim about GPUs.
"""
