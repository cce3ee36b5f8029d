"""Checkpoints: safetensors and JSON only, complete or absent.

checkpoints/step_000050/
    policy/            loads with from_pretrained, tokenizer included; with LoRA the adapter
    merged/            with LoRA and checkpoint.merged: the whole model
    critic.safetensors reference.safetensors optimizer.safetensors state.json
    manifest.json      format; size and SHA-256 of every other file

atomic.py writes the directory; resume.py chooses the one a run resumes from.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlswitch.checkpoint import resume
from rlswitch.checkpoint.atomic import is_disk_error, written_atomically
from rlswitch.checkpoint.resume import LoopState, step_of, steps_in
from rlswitch.config.sections import CheckpointConfig
from rlswitch.errors import ConfigError, SaveError
from rlswitch.records.provenance import flattened
from rlswitch.text import first_line
from rlswitch.training import lora
from rlswitch.training.schedule import resume_schedule
from rlswitch.training.trainer import Trainer


def is_due(config: CheckpointConfig, step: int, num_steps: int) -> bool:
    return step == num_steps or (config.every > 0 and step % config.every == 0)


def save(
    directory: Path,
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    state: LoopState,
    keep: int,
    how_to_resume: str = "run the same command again",
) -> Path:
    """Writes `directory`/step_NNNNNN, then removes all but the newest `keep`. Raises SaveError.

    If interrupted it leaves either the previous checkpoint or the complete new one.
    """
    final = resume.step_directory(directory, state.step)
    try:
        with written_atomically(final) as draft:
            _write(draft, trainer, tokenizer, state)
    except Exception as error:
        if not is_disk_error(error):
            raise
        other = next(resume.valid_checkpoints(directory), None)
        left = f"{other} is intact" if other else "there is no earlier one"
        raise SaveError(
            f"checkpoint {final} could not be saved ({first_line(error)}); {left}; make sure that"
            f" {directory} has space and can be written to, then {how_to_resume}"
        ) from error
    steps = steps_in(directory)
    kept = [path for path in steps if step_of(path) <= state.step][-keep:]  # later ones are abandoned
    for old in set(steps) - set(kept):
        shutil.rmtree(old, ignore_errors=True)
    return final


def restore(path: Path, trainer: Trainer) -> None:
    """Loads a checkpoint into a freshly built trainer."""
    details = json.loads((path / resume.STATE).read_bytes())
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
    # Tensors only: learning rates and the like come from the run's settings, which may have changed.
    groups = trainer.optimizer.state_dict()["param_groups"]
    trainer.optimizer.load_state_dict(_join(load_file(path / "optimizer.safetensors"), groups))
    resume_schedule(trainer.schedule, details["optimizer_steps"])
    trainer.memory.update(details["memory"])
    if fitted := details.get("micro_batch_tokens"):
        trainer.limit.tokens = min(trainer.limit.tokens, fitted)
    trainer.version = details["step"]


def _write(draft: Path, trainer: Trainer, tokenizer: PreTrainedTokenizerBase, state: LoopState) -> None:
    _save_policy(trainer, tokenizer, draft)
    if trainer.critic is not None:
        critic = trainer.accelerator.unwrap_model(trainer.critic)
        save_file(_learned(critic), draft / "critic.safetensors")
    if trainer.reference is not None and (reference := trainer.reference.state()):
        save_file(reference, draft / "reference.safetensors")
    moments = flattened(trainer.optimizer.state_dict()["state"]).items()
    tensors = {key: value.contiguous() for key, value in moments if isinstance(value, Tensor)}
    save_file(tensors, draft / "optimizer.safetensors")
    details = asdict(state) | {
        "settings": resume.deciding(trainer.run),
        "optimizer_steps": trainer.schedule.last_epoch,
        "memory": trainer.memory,
        "micro_batch_tokens": trainer.limit.reduced,
    }
    (draft / resume.STATE).write_text(json.dumps(details, indent=1))


def _save_policy(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, draft: Path) -> None:
    policy = trainer.unwrapped_policy
    directories = [draft / "policy"]
    if isinstance(policy, lora.PeftModel):
        lora.save_adapter(policy, draft / "policy")
        if trainer.run.checkpoint.merged:
            directories.append(draft / "merged")
            tied = set(lora.base_of(policy).all_tied_weights_keys)
            # Moved to host memory one by one: the engine may hold the device.
            whole = {name: t.cpu() for name, t in lora.merged_tensors(policy) if name not in tied}
            lora.base_of(policy).save_pretrained(draft / "merged", state_dict=whole)
    else:
        policy.save_pretrained(draft / "policy")
    for directory in directories:
        tokenizer.save_pretrained(directory)


def _learned(model: nn.Module) -> dict[str, Tensor]:
    """The state that training changes: with LoRA the adapters and the head."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def _load_all(model: Any, tensors: dict[str, Tensor], known: set[str], path: Path) -> None:
    """Loads `tensors`; only those in `known`, tied or never trained, may be missing."""
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    lost = [name for name in missing if name not in known]
    if lost or unexpected:
        raise ConfigError(
            f"resume = {path}: it does not fit the model (missing {lost[:2]}, unknown {unexpected[:2]})"
        )


def _join(tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """An optimizer's state from its tensors by `parameter index.name`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": groups}
