"""Which backend the settings of an engine ask for."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rlswitch.config.sections import EngineConfig, ServerEngineConfig
from rlswitch.engines.backend import Backend
from rlswitch.engines.vllm.launcher import refuse_unfit_server
from rlswitch.engines.vllm.local import LocalBackend, refuse_missing_features
from rlswitch.engines.vllm.server import ServerBackend
from rlswitch.run import Run
from rlswitch.switch.device import Device

BACKENDS: dict[type[EngineConfig], type[LocalBackend] | type[ServerBackend]] = {
    EngineConfig: LocalBackend,
    ServerEngineConfig: ServerBackend,
}
"""By the settings that ask for it: OPTIONS of config.py has their names."""


def refuse_unfit_engine(run: Run, model_path: str) -> None:
    """Raises ConfigError for what the server at engine.url, or this vLLM and this GPU, cannot do."""
    if isinstance(run.engine, ServerEngineConfig) and run.engine.url:
        refuse_unfit_server(run, model_path)
    else:
        refuse_missing_features(run)


def start_backend(
    run: Run,
    model_path: str,
    tokenizer: PreTrainedTokenizerBase,
    device: Device,
    log_path: Path,
    scratch: Path,
    warm: bool = True,
) -> Backend:
    """vLLM on `model_path`, awake. `scratch` is removed should this process be killed."""
    return BACKENDS[type(run.engine)](run, model_path, tokenizer, device, log_path, scratch, warm)
