# Everything runs in .venv, which scripts/setup.sh makes; see there for DEVICE= and PYTHON=.
SHELL := /bin/bash
PY := .venv/bin/python
ARGS ?=
# scripts/setup.sh says why.
unexport PYTHONDONTWRITEBYTECODE
recipe = ppo

.PHONY: train test check lint format setup setup-test clean

# `make train recipe=grpo`, or `make train ARGS="recipe=grpo num_steps=20"`: Hydra refuses to be
# told the recipe twice.
train: setup
	@$(PY) train.py $(if $(filter recipe=%,$(ARGS)),,recipe=$(recipe)) $(ARGS)

# Every test, those that start a real vLLM engine too.
test: setup-test
	@$(PY) -m pytest $(ARGS)

# What must be green before a commit: what is quick.
check: lint
	@$(PY) -m pytest -q -m "not engine and not processes"

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
