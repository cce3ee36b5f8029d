"""Rollout engines: the one package that knows vLLM, and the words sleep, wake_up and reload_weights.

base.py is the state machine every engine obeys. To add an engine: a Backend with its verbs, and a line in
BACKENDS (start.py); tests/engine/test_contract.py is the contract it has to pass.
"""
