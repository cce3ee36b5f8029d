"""Checkpoints: safetensors and JSON only, complete or not there at all.

checkpoints/step_000050/
    policy/            loads with from_pretrained, tokenizer included; with LoRA the adapter
    merged/            with LoRA, if asked for: the whole model
    critic.safetensors reference.safetensors optimizer.safetensors state.json
    manifest.json      size and SHA-256 of every other file, written last
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlswitch import lora
from rlswitch.config import CheckpointConfig, Run
from rlswitch.schedule import resume_schedule
from rlswitch.trainer import Trainer
from rlswitch.types import ConfigError

SCHEMA = 1
MANIFEST = "manifest.json"


@dataclass(kw_only=True, slots=True)
class LoopState:
    """What a run has to remember besides tensors. Everything random is derived from (seed, step)."""

    step: int = 0
    cursor: int = 0
    """Training prompts handed out so far."""
    wandb_id: str | None = None
    model: str = ""
    """model.path of the run: the checkpoint of another model is refused."""
    schema: int = SCHEMA


def is_due(config: CheckpointConfig, step: int, num_steps: int) -> bool:
    return step == num_steps or (config.every > 0 and step % config.every == 0)


def save(
    directory: Path,
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    state: LoopState,
    keep: int,
) -> Path:
    """Writes `directory`/step_NNNNNN through a temporary name; a kill leaves the old or the new."""
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / f"step_{state.step:06d}"
    draft = directory / f".{final.name}.tmp"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    _save_policy(trainer, tokenizer, draft)
    if trainer.critic is not None:
        critic = trainer.accelerator.unwrap_model(trainer.critic)
        save_file(_learned(critic), draft / "critic.safetensors")
    if trainer.reference is not None and (reference := trainer.reference.state()):
        save_file(reference, draft / "reference.safetensors")
    save_file(_split(trainer.optimizer.state_dict()), draft / "optimizer.safetensors")
    details = asdict(state) | {
        "optimizer_steps": trainer.schedule.last_epoch,
        "memory": trainer.memory,
    }
    (draft / "state.json").write_text(json.dumps(details, indent=1))
    (draft / MANIFEST).write_text(json.dumps(_manifest(draft), indent=1))
    _make_durable(draft)
    aside = directory / f".{final.name}.old"
    if final.exists():
        os.replace(final, aside)
    os.replace(draft, final)
    _sync(directory)
    shutil.rmtree(aside, ignore_errors=True)
    steps = _steps(directory)
    kept = [path for path in steps if path <= final][-keep:]  # later ones: of a run given up
    for old in set(steps) - set(kept):
        shutil.rmtree(old, ignore_errors=True)
    return final


def newest(directory: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are all as the manifest says; broken ones are named."""
    for path in reversed(_steps(directory)):
        fault = find_fault(path)
        if fault is None:
            return path
        say(f"checkpoint {path} is passed over: {fault}")
    return None


def find_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"its manifest cannot be read ({error})"
    for name, expected in manifest.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if expected.keys() != {"bytes", "sha256"}:
            return f"its manifest is corrupt (at {name})"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, the manifest says {expected['bytes']}"
        if _digest(file) != expected["sha256"]:
            return f"{name} is corrupt (its SHA-256 differs from the manifest's)"
    return None


def finished(run: Run) -> str | None:
    """What to tell somebody who starts a run again that has nothing left to do."""
    if run.resume == "never" or run.output_dir is None:
        return None
    saved = [p for p in _steps(Path(run.output_dir) / "checkpoints") if find_fault(p) is None]
    step = int(saved[-1].name.removeprefix("step_")) if saved else 0
    if step < run.num_steps:
        return None
    return (
        f"run is complete: {run.output_dir} has step {step} of {run.num_steps};"
        " raise num_steps to go on, or set resume=never or another output_dir to start afresh"
    )


def resume_from(run: Run, output_dir: Path, say: Callable[[str], None]) -> Path | None:
    """The checkpoint that `run.resume` means, or None to start afresh. Raises ConfigError."""
    if run.resume == "never":
        return None
    if run.resume == "auto":
        return newest(output_dir / "checkpoints", say)
    path = Path(run.resume)
    fault = find_fault(path) if path.is_dir() else "there is no such directory"
    if fault:
        raise ConfigError(f"resume = {run.resume}: {fault}; set resume=auto or another checkpoint")
    return path


def read_state(path: Path, run: Run) -> LoopState:
    """The loop's part of a checkpoint. Raises ConfigError for another model or a newer format."""
    details = json.loads((path / "state.json").read_text())
    if details["schema"] > SCHEMA:
        raise ConfigError(
            f"resume = {path}: checkpoint format {details['schema']}, this reads {SCHEMA};"
            " install the rlswitch that saved it, or set resume=never"
        )
    state = LoopState(**{name: details[name] for name in LoopState.__slots__})
    if state.model != run.model.path:
        raise ConfigError(
            f"resume = {path}: it is of model.path {state.model}, the run says {run.model.path};"
            " set resume=never or another output_dir"
        )
    if (path / "critic.safetensors").exists() != run.algorithm.needs_critic:
        having = "without" if run.algorithm.needs_critic else "with"
        raise ConfigError(
            f"resume = {path}: it was trained by an algorithm {having} a critic; set the algorithm it"
            " had, or another output_dir"
        )
    return state


def restore(path: Path, trainer: Trainer) -> None:
    """Puts the checkpoint's tensors into a freshly built trainer."""
    details = json.loads((path / "state.json").read_text())
    policy = trainer.unwrapped_policy
    if isinstance(policy, lora.PeftModel):
        lora.load_adapter(policy, path / "policy")
    else:
        tensors: dict[str, Tensor] = {}
        for file in sorted((path / "policy").glob("*.safetensors")):
            tensors |= load_file(file)
        _load_all(policy, tensors, known=set(policy.all_tied_weights_keys), path=path)
    if trainer.critic is not None:
        critic = trainer.accelerator.unwrap_model(trainer.critic)
        frozen = {name for name, parameter in critic.named_parameters() if not parameter.requires_grad}
        _load_all(critic, load_file(path / "critic.safetensors"), known=frozen, path=path)
    if trainer.reference is not None and (path / "reference.safetensors").exists():
        trainer.reference.load(load_file(path / "reference.safetensors", device=trainer.device.kind))
    # Its tensors alone: learning rates and the like are the run's, which may have changed them.
    groups = trainer.optimizer.state_dict()["param_groups"]
    trainer.optimizer.load_state_dict(_join(load_file(path / "optimizer.safetensors"), groups))
    resume_schedule(trainer.schedule, details["optimizer_steps"])
    trainer.memory.update(details["memory"])
    trainer.version = details["step"]


def _save_policy(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, draft: Path) -> None:
    policy = trainer.unwrapped_policy
    directories = [draft / "policy"]
    if isinstance(policy, lora.PeftModel):
        lora.save_adapter(policy, draft / "policy")
        if trainer.run.checkpoint.merged:
            directories.append(draft / "merged")
            tied = set(lora.base_of(policy).all_tied_weights_keys)
            # To host memory one by one: the engine may have the device.
            whole = {name: t.cpu() for name, t in lora.merged_tensors(policy) if name not in tied}
            lora.base_of(policy).save_pretrained(draft / "merged", state_dict=whole)
    else:
        policy.save_pretrained(draft / "policy")
    for directory in directories:
        tokenizer.save_pretrained(directory)


def _learned(model: nn.Module) -> dict[str, Tensor]:
    """The state that training changes: of an adapted model the adapters and the head."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def _load_all(model: Any, tensors: dict[str, Tensor], known: set[str], path: Path) -> None:
    """Loads what was saved; `known` may be missing: tied to something else, or never changed."""
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    lost = [name for name in missing if name not in known]
    if lost or unexpected:
        raise ConfigError(
            f"resume = {path}: it does not fit the model (missing {lost[:2]}, unknown {unexpected[:2]})"
        )


def _split(state: dict[str, Any]) -> dict[str, Tensor]:
    """An optimizer's state as named tensors."""
    return {
        f"{index}.{name}": value.contiguous()
        for index, values in state["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def _join(tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": groups}


def _manifest(directory: Path) -> dict[str, dict[str, Any]]:
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return {
        str(file.relative_to(directory)): {"bytes": file.stat().st_size, "sha256": _digest(file)}
        for file in files
    }


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _make_durable(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _steps(directory: Path) -> list[Path]:
    return sorted(directory.glob("step_*"))
