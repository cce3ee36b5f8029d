# Everything runs in .venv, which scripts/setup.sh makes; see there for DEVICE= and PYTHON=.
SHELL := /bin/bash
PY := .venv/bin/python
ARGS ?=
# Some set it; without bytecode every Python compiles torch and vLLM anew (scripts/setup.sh).
unexport PYTHONDONTWRITEBYTECODE
recipe = ppo

# A process of tests for each core and one more, since many wait; each computes on one core.
# ARGS="-n 0 -x FILE" has one alone.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n $$(($$(nproc) + 1)) --maxprocesses 5

.PHONY: train test check lint format setup setup-test clean

# `make train recipe=grpo`, or `make train ARGS="recipe=grpo num_steps=20"`: Hydra refuses to be
# told the recipe twice.
train: setup
	@$(PY) train.py $(if $(filter recipe=%,$(ARGS)),,recipe=$(recipe)) $(ARGS)

# Every test, those that start a real vLLM engine too.
test: setup-test
	@$(PYTEST) $(ARGS)

# What must be green before a commit: what is quick.
check: lint
	@$(PYTEST) -n $$(nproc) -q -m "not engine and not processes and not slow"

lint: setup-test
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m mypy

format: setup-test
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

setup:
	@scripts/setup.sh

setup-test:
	@scripts/setup.sh --test

# Caches and builds. Runs stay, and so does .venv.
clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
