"""Reads a model's directory, tokenizer and configuration, without the weights and without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from rlswitch.data.rows import BUILTIN, HUB_ID, check_builtin, nearest_file, reason
from rlswitch.errors import ConfigError
from rlswitch.text import first_line

if TYPE_CHECKING:  # it takes seconds to import
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from rlswitch.config.sections import ModelConfig
    from rlswitch.run import Run

MODELS = {
    "addition": "rlswitch.recipes.addition.policy",
    "addition-judge": "rlswitch.recipes.addition.judge",
    "addition-reward-model": "rlswitch.recipes.addition.reward_model",
}
"""A module with `ensure_model` and `build_model` for each built-in model. The model's name is its task's name
or begins with it: they share a tokenizer."""
OR_HUB = "or a hub id that is cached or reachable"
PICKLES = ("*.bin", "*.pt", "*.pth")
TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
"""Without any of these files transformers builds an empty tokenizer: every prompt would have no tokens."""


def builtin_model(path: str, key: str = "model.path") -> ModuleType | None:
    """The module that makes `builtin:NAME`; None for any other path. Raises ConfigError if there is none."""
    check_builtin(key, path, "model", MODELS)
    return import_module(MODELS[path.removeprefix(BUILTIN)]) if path.startswith(BUILTIN) else None


def resolve_model(config: ModelConfig, log: Callable[[str], None], key: str = "model.path") -> str:
    """The local directory of a path, a hub id or a built-in model. Errors blame the setting `key`."""
    if module := builtin_model(config.path, key):
        return str(module.ensure_model(config.warm_start_seed, log))
    if Path(config.path).is_dir():
        return config.path
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(
            config.path,
            revision=config.revision,
            allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"],
        )
    except Exception as error:
        raise ConfigError(
            f"{key} = {config.path}: not a directory, and downloading it failed: {first_line(error)};"
            f" set a directory with a whole model, {OR_HUB}"
        ) from error


def load_tokenizer(model: ModelConfig, path: str, key: str = "model.path") -> PreTrainedTokenizerBase:
    """The tokenizer in `path`, with eos as pad token where it has none. Raises ConfigError, blaming `key`."""
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, "tokenizer", model, path, key)
    blame = f"{key} = {model.path}"
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{blame}: its tokenizer has no end-of-sequence token, so no completion would ever end;"
            " set eos_token in its tokenizer_config.json"
        )
    if problem := _foreign_token_problem(tokenizer, Path(path, "config.json")):
        raise ConfigError(f"{blame}: {problem}; use the tokenizer that belongs to the model")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_config(model: ModelConfig, path: str, key: str = "model.path") -> PretrainedConfig:
    """The config.json in `path`. Raises ConfigError, blaming `key`."""
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, "configuration", model, path, key)


def _from_pretrained(kind: Any, part: str, model: ModelConfig, path: str, key: str) -> Any:
    try:
        return kind.from_pretrained(path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # transformers, the hub and a model's own code raise nearly every type
        raise unreadable(model, key, error, part) from error


def unreadable(model: ModelConfig, key: str, error: Exception, part: str = "configuration") -> ConfigError:
    """The error for a model whose `part` cannot be loaded."""
    if "trust_remote_code" in str(error):
        problem = "is custom code, which runs only for model.path, with model.trust_remote_code=true"
        advice = "set that if you trust its authors" if key == "model.path" else "set another model"
    else:
        kind = "sequence classifier" if key == "reward_model.path" else "causal language model"
        problem = f"cannot be read ({reason(error)})"
        advice = f"set a directory with a whole {kind}, {OR_HUB}"
    return ConfigError(f"{key} = {model.path}: its {part} {problem}; {advice}")


def _foreign_token_problem(tokenizer: PreTrainedTokenizerBase, file: Path) -> str:
    """A token that may occur in a prompt and that the model of `file`, its config.json, does not embed."""
    if not file.is_file():  # a hub id
        return ""
    config = json.loads(file.read_text())
    embedded = (config.get("text_config") or config).get("vocab_size") or len(tokenizer)
    special = {*tokenizer.all_special_ids} - {tokenizer.eos_token_id}
    for token, index in tokenizer.get_vocab().items() if len(tokenizer) > embedded else ():
        if index >= embedded and index not in special:
            return f"its tokenizer has token {index} ({token!r}), but the model embeds only {embedded} tokens"
    return ""


def check_is_causal_lm(model: ModelConfig, config: PretrainedConfig) -> None:
    """Raises ConfigError for a model that does not generate text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as GENERATING

    is_custom = "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if config.model_type not in GENERATING and not is_custom:
        raise ConfigError(
            f"model.path = {model.path}: models of type {config.model_type} do not generate text; set a"
            " causal language model"
        )


def context_of(config: PretrainedConfig) -> int | None:
    """The model's context length in tokens, if its configuration names one."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_fits_context(run: Run, config: Any) -> None:
    """Raises ConfigError if a prompt and its completion can exceed the model's context length."""
    limit = context_of(config)
    if limit is not None and run.max_model_len > limit:
        raise ConfigError(
            f"rollout.max_new_tokens = {run.rollout.max_new_tokens}: plus data.max_prompt_tokens"
            f" {run.data.max_prompt_tokens} is {run.max_model_len} tokens, but the context of"
            f" {run.model.path} is {limit}; lower one of them"
        )


def check_model_path(key: str, path: str) -> None:
    """Raises ConfigError if `path`, the value of the setting `key`, cannot be a model or is incomplete."""
    check_builtin(key, path, "model", MODELS)
    directory, problem = Path(path), ""
    if os.path.isdir(directory):
        problem = _directory_problem(directory)
    elif os.path.exists(directory):
        problem = "is a file; set the directory it lies in"
    elif not (HUB_ID.fullmatch(path) or path.startswith(BUILTIN)):
        problem = f"no such directory, and not a hub id (name or owner/name){nearest_file(directory)}"
    if problem:
        raise ConfigError(f"{key} = {path}: {problem}")


def _directory_problem(directory: Path) -> str:
    """What a model directory lacks. Reads the headers of the weights, not the weights."""
    if not (directory / "config.json").is_file():
        adapter = (directory / "adapter_config.json").is_file()
        what = "it holds a LoRA adapter" if adapter else "no model is saved there"
        return f"has no config.json: {what}; set the directory of a whole model"
    try:
        json.loads((directory / "config.json").read_text())
        index = directory / "model.safetensors.index.json"
        parts = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"its JSON files cannot be read ({reason(error)}); copy the model again"
    if not any(path for pattern in TOKENIZERS for path in directory.glob(pattern)):
        return "has no tokenizer; save it beside the weights with save_pretrained"
    files = sorted(directory.glob("*.safetensors"))
    if missing := sorted(parts - {file.name for file in files}):
        return f"has no {missing[0]}, which its index names; copy the model again"
    if not files:
        pickles = [file.name for pattern in PICKLES for file in directory.glob(pattern)]
        only = f", only {pickles[0]}: loading a pickle could run code" if pickles else ""
        return f"has no *.safetensors{only}; save the model with save_pretrained"
    for file in files:
        try:
            with safe_open(file, "np"):  # reads the header, and compares the file's size with it
                pass
        except (OSError, SafetensorError) as error:
            return f"{file.name} is incomplete or not safetensors ({first_line(error)}); copy it again"
    return ""
