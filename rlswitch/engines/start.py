"""The one door to an engine, for the policy, a judge, models that take turns, and benchmarks."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from rlswitch.config.sections import EngineConfig, ServerEngineConfig
from rlswitch.engines.backend import Backend
from rlswitch.engines.engine import Engine
from rlswitch.engines.revival import RestartingEngine
from rlswitch.engines.spec import EngineSpec, Launch
from rlswitch.engines.vllm.local import LocalBackend, check_features
from rlswitch.engines.vllm.server import ServerBackend, check_server
from rlswitch.proof.canary import canary_length, canary_sequences, canary_start
from rlswitch.proof.checks import LEARNED_FLOOR, Tolerance
from rlswitch.proof.fingerprint import (
    checkpoint_files,
    checkpoint_tensors,
    tensor_fingerprint,
    total_fingerprint,
)
from rlswitch.switch.device import Device
from rlswitch.switch.ledger import Ledger
from rlswitch.types import Canary, PolicyWeights

BACKENDS: dict[type[EngineConfig], Callable[[Launch], Backend]] = {
    EngineConfig: LocalBackend,
    ServerEngineConfig: ServerBackend,
}
"""The backend for each class of settings; OPTIONS in run.py names the settings."""


def check_engine(spec: EngineSpec, model: str) -> None:
    """Raises ConfigError if the server at engine.url, or this vLLM and GPU, cannot do what `spec` asks.

    `model` is the model as the user named it, a hub id for example.
    """
    if isinstance(spec.settings, ServerEngineConfig) and spec.settings.url:
        check_server(spec, model)
    else:
        check_features(spec)


def start_engine(
    spec: EngineSpec,
    tokenizer: PreTrainedTokenizerBase,
    ledger: Ledger,
    log_path: Path,
    scratch: Path,
    frozen: bool = False,
    log: Callable[[str], None] = print,
) -> RestartingEngine:
    """An engine that is awake and not yet proven; it is restarted when it is lost.

    A `frozen` engine serves its own checkpoint and takes no pushes: `switch.give_to(engine)`. `scratch` is
    removed by the engine's processes if this one is killed. Raises EngineError.
    """
    launch = Launch(spec=spec, tokenizer=tokenizer, device=ledger.device, log_path=log_path, scratch=scratch)
    start = partial(start_backend, launch)
    backend = start()
    try:
        engine = engine_on(backend, spec, tokenizer, ledger, frozen)
    except BaseException:
        backend.close()
        raise
    return RestartingEngine(engine, start, spec.settings.max_restarts, log)


def start_backend(launch: Launch) -> Backend:
    return BACKENDS[type(launch.spec.settings)](launch)


def engine_on(
    backend: Backend, spec: EngineSpec, tokenizer: PreTrainedTokenizerBase, ledger: Ledger, frozen: bool
) -> Engine:
    """The state machine of a backend that has just started with `spec`."""
    if not frozen:
        return Engine(spec, backend, tokenizer, ledger, Tolerance(spec.tolerance))
    sequences: list[list[int]] = []
    if spec.verify != "off":
        length = canary_length(spec.max_model_len, backend.block_size)
        sequences = canary_sequences([], len(tokenizer), length, canary_start(tokenizer))
    base_weights = read_base_weights(spec, backend, sequences, ledger.device)
    # It is compared with itself, so even in bfloat16 only the order of sums may differ: nothing to learn.
    tolerance = Tolerance(spec.tolerance, mean=LEARNED_FLOOR)
    return Engine(spec, backend, tokenizer, ledger, tolerance, base_weights)


def read_base_weights(
    spec: EngineSpec, backend: Backend, sequences: list[list[int]], device: Device
) -> PolicyWeights:
    """The checkpoint that a fresh `backend` serves, as version 0; unread where nothing will be proven.

    `initial_fingerprints` come from the engine, not from the files: a checkpoint may hold tensors that the
    engine does not use, such as a separate copy of a tied head.
    """
    path, dtype = Path(spec.model_path), getattr(torch, spec.dtype)
    tensors = {
        name: tensor_fingerprint(tensor.to(device.torch), dtype)
        for name, tensor in (checkpoint_tensors(path) if sequences else ())
    }
    return PolicyWeights(
        version=0,
        path=path,
        nbytes=sum(file.stat().st_size for file in checkpoint_files(path)),
        fingerprint=total_fingerprint(tensors.values()),
        tensors=tensors,
        canary=Canary(sequences=sequences, logprobs=backend.score(sequences) if sequences else []),
        initial_fingerprints=[report["live"] for report in backend.fingerprint()] if sequences else None,
    )
