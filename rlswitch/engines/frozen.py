"""Frozen engines: they serve a checkpoint of their own, a judge's or one of two models that take turns.

Nothing is pushed into them: `switch.give_to(engine)`. They are proven all the same, against what the
checkpoint held and what the engine computed from it when it was started.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from rlswitch.engines.backend import Backend
from rlswitch.engines.engine import Engine, Revival
from rlswitch.engines.start import start_backend
from rlswitch.engines.vllm.arguments import engine_dtype
from rlswitch.proof import checks as proof
from rlswitch.proof.canary import canary_sequences
from rlswitch.proof.fingerprint import (
    checkpoint_files,
    checkpoint_tensors,
    named_fingerprints,
    total_fingerprint,
)
from rlswitch.run import Run
from rlswitch.switch.device import Device
from rlswitch.switch.ledger import Ledger
from rlswitch.types import Canary, PolicyWeights


def start_frozen(
    name: str,
    run: Run,
    model_path: str,
    tokenizer: PreTrainedTokenizerBase,
    ledger: Ledger,
    log_path: Path,
    scratch: Path,
    say: Callable[[str], None],
) -> Engine:
    """vLLM on the checkpoint in `model_path`, awake; one that is lost is started again."""
    start = partial(start_backend, run, model_path, tokenizer, ledger.device, log_path, scratch)
    backend = start()
    try:
        revival = Revival(start=start, limit=run.engine.max_restarts, say=say)
        return freeze(name, backend, run, model_path, tokenizer, ledger, revival)
    except BaseException:
        backend.close()
        raise


def freeze(
    name: str,
    backend: Backend,
    run: Run,
    model_path: str,
    tokenizer: PreTrainedTokenizerBase,
    ledger: Ledger,
    revival: Revival | None = None,
) -> Engine:
    """An engine that serves the checkpoint in `model_path` for good; its backend has just been started."""
    device = ledger.device
    exact = engine_dtype(run.model.dtype, device) == "float32" and device.kind == "cpu"
    length = min(run.max_model_len - 1, max(backend.block_size + 2, 32))
    sequences = canary_sequences([], vocabulary=len(tokenizer), length=length)
    return Engine(
        name,
        backend,
        tokenizer,
        ledger,
        level=run.switch.level,
        verify=run.switch.verify,
        # The engine is compared with itself: in other dtypes only the order of sums may differ.
        tolerance=proof.Tolerance(run.switch.canary_tolerance if exact else proof.LEARNED_FLOOR),
        own=own_checkpoint(
            Path(model_path),
            backend,
            sequences,
            getattr(torch, engine_dtype(run.model.dtype, device)),
            device,
        )
        if run.switch.verify != "off"
        else unread_checkpoint(Path(model_path)),
        revival=revival,
    )


def own_checkpoint(
    path: Path, backend: Backend, sequences: list[list[int]], dtype: torch.dtype, device: Device
) -> PolicyWeights:
    """What a freshly started `backend` serves, as a version to go back to: each tensor is read once.

    `held` is taken from the engine, not from the files: a checkpoint may hold what an engine has no use
    for, such as a tied head of its own.
    """
    tensors: dict[str, int] = {}
    for name, tensor in checkpoint_tensors(path):
        tensors |= named_fingerprints([(name, tensor.to(device.torch))], dtype)
    return PolicyWeights(
        version=0,
        path=path,
        nbytes=_size(path),
        fingerprint=total_fingerprint(tensors.values()),
        tensors=tensors,
        canary=Canary(sequences=sequences, logprobs=backend.score(sequences)),
        held=[report["live"] for report in backend.fingerprint()],
    )


def unread_checkpoint(path: Path) -> PolicyWeights:
    """One that nobody will ask a proof of."""
    canary = Canary(sequences=[], logprobs=[])
    return PolicyWeights(version=0, path=path, nbytes=_size(path), fingerprint=0, tensors={}, canary=canary)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in checkpoint_files(path))
