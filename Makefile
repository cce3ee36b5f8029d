# Everything runs in .venv, which scripts/setup.sh creates; DEVICE= and PYTHON= are documented there.
SHELL := /bin/bash
PY := .venv/bin/python
ARGS ?=
# Without bytecode caches, every Python process compiles torch and vLLM again (scripts/setup.sh).
unexport PYTHONDONTWRITEBYTECODE
recipe = ppo

# One test process per core plus one, because many tests wait; each computes on one core.
# ARGS="-n 0 -x FILE" runs one file in one process.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n $$(($$(nproc) + 1)) --maxprocesses 5

.PHONY: train test check gpu-check lint format setup setup-test clean

# `make train recipe=grpo` or `make train ARGS="recipe=grpo num_steps=20"`: Hydra rejects a second recipe.
train: setup
	@$(PY) train.py $(if $(filter recipe=%,$(ARGS)),,recipe=$(recipe)) $(ARGS)

# All tests, including those that start a real vLLM engine.
test: setup-test
	@$(PYTEST) $(ARGS)

# Run before each commit: format, lint, types and the fast tests.
check: lint
	@$(PYTEST) -n $$(nproc) -q -m "not engine and not processes and not slow"

# Everything that the claims need from a GPU, within ten minutes (docs/gpu.md).
# `make gpu-check ARGS="--stages fork,turns --limit-s 200"`. Without a GPU: the same stages in small.
gpu-check: setup
	@$(PY) scripts/gpu_check.py $(ARGS)

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

# Deletes caches and builds; keeps runs/ and .venv.
clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
