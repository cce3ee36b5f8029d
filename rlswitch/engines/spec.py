"""What describes an engine, and what starts it."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rlswitch.config.sections import EngineConfig, ModelConfig, SwitchConfig
from rlswitch.switch.device import Device


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSpec:
    """An engine, whatever it is for: the policy, a judge, or one of several models that take turns."""

    name: str
    """In switch.jsonl and in messages."""
    model_path: str
    """A local directory."""
    dtype: str
    """float32, bfloat16 or float16: `auto` is resolved by `engine_dtype`."""
    max_model_len: int
    """Longest prompt plus completion, in tokens."""
    seed: int
    trust_remote_code: bool
    settings: EngineConfig
    level: str
    """Sleep level: 0, kv, 1 or 2."""
    verify: str
    """Which pushes to prove: every, first or off."""
    tolerance: float | None
    """Largest |difference| of a canary log-probability; None: the mean is judged, with a learned limit."""


def engine_spec(
    name: str,
    model: ModelConfig,
    settings: EngineConfig,
    switch: SwitchConfig,
    device: Device,
    *,
    model_path: str,
    max_model_len: int,
    seed: int,
) -> EngineSpec:
    """The spec of an engine on `device` that serves `model`, which lies in `model_path`."""
    dtype = engine_dtype(model.dtype, device)
    exact = dtype == "float32" and device.kind == "cpu"
    return EngineSpec(
        name=name,
        model_path=model_path,
        dtype=dtype,
        max_model_len=max_model_len,
        seed=seed,
        trust_remote_code=model.trust_remote_code,
        settings=settings,
        level=switch.level,
        verify=switch.verify,
        tolerance=switch.canary_tolerance if exact else None,
    )


def engine_dtype(dtype: str, device: Device) -> str:
    """Resolves `model.dtype`: auto is bfloat16 on CUDA and float32 on a CPU."""
    return {"cpu": "float32", "cuda": "bfloat16"}[device.kind] if dtype == "auto" else dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """What starts a backend for a spec, the first time and after every loss."""

    spec: EngineSpec
    tokenizer: PreTrainedTokenizerBase
    device: Device
    log_path: Path
    scratch: Path
    """A directory that the engine's processes remove if this process is killed."""
    warm_up: bool = True
    """Run a first forward pass at the start."""
