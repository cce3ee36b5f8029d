"""Engines: the one package that knows vLLM and the words sleep, wake_up and reload_weights.

`start_engine` (start.py) is the door, engine.py the state machine, revival.py restarts it. To add a kind of
engine: a Backend, its settings and a line in BACKENDS (start.py); tests/engines/test_contract.py has to pass.
"""
