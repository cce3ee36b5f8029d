"""Which backend the settings of an engine ask for."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rlswitch.config import Run, ServerEngineConfig
from rlswitch.device import Device
from rlswitch.engines.backend import Backend
from rlswitch.engines.local import LocalBackend
from rlswitch.engines.server import ServerBackend


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
    kind = ServerBackend if isinstance(run.engine, ServerEngineConfig) else LocalBackend
    return kind(run, model_path, tokenizer, device, log_path, scratch, warm)
