"""The engine that a run asks for."""

from __future__ import annotations

from rlswitch.engines.spec import EngineSpec, engine_spec
from rlswitch.run import Run
from rlswitch.switch.device import Device


def policy_spec(run: Run, model_path: str, device: Device) -> EngineSpec:
    """The rollout engine of `run`, whose model lies in `model_path`."""
    return engine_spec(
        "rollout engine",
        run.model,
        run.engine,
        run.switch,
        device,
        model_path=model_path,
        max_model_len=run.max_model_len,
        seed=run.seed,
    )
