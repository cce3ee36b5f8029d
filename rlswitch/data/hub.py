"""What lies at a model's path: its directory, tokenizer and configuration. Nothing here needs torch."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rlswitch.data.builtin import MODELS, refuse_unknown_task
from rlswitch.data.rows import HUB_ID, reason
from rlswitch.errors import ConfigError
from rlswitch.text import first_line

if TYPE_CHECKING:  # it takes seconds to import
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from rlswitch.config.sections import ModelConfig
    from rlswitch.run import Run


def resolve_model(config: ModelConfig, say: Callable[[str], None], key: str = "model.path") -> str:
    """The local directory of `config.path`: itself, a hub snapshot, or a built-in model made now.

    `key` is the setting that names it, for what is said when there is no such model.
    """
    module = builtin_model(config.path, key)
    if module is not None:
        return str(module.ensure_model(config.warm_start_seed, say))
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
            f"{key} = {config.path}: is no directory, and the hub does not give it: {first_line(error)};"
            " set a directory with config.json and *.safetensors, or a hub id that is cached or reachable"
        ) from error


def builtin_model(path: str, key: str = "model.path") -> ModuleType | None:
    """The module behind `builtin:NAME`, None for any other path. Raises ConfigError for an unknown one."""
    if not path.startswith("builtin:"):
        return None
    refuse_unknown_task(key, path)
    return importlib.import_module(MODELS[path.removeprefix("builtin:")])


def load_tokenizer(model: ModelConfig, path: str, key: str = "model.path") -> PreTrainedTokenizerBase:
    """The tokenizer at `path`, where the setting `key` leads to; a missing pad token becomes eos."""
    from transformers import AutoTokenizer

    blame = f"{key} = {model.path}"
    if not Path(path).exists() and not HUB_ID.fullmatch(path):
        raise ConfigError(f"{blame}: no such directory, and not a hub id (name or owner/name)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # transformers raises nearly every type: all mean the same to a user
        what = f"cannot load its tokenizer ({reason(error)})"
        if "trust_remote_code" in str(error):
            what = "its tokenizer is custom code; " + (
                "set model.trust_remote_code=true to run it"
                if key == "model.path"
                else "it would not be run, model.trust_remote_code is for model.path alone; set another model"
            )
        raise ConfigError(f"{blame}: {what}") from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{blame}: its tokenizer has no end-of-sequence token, so no completion would ever end;"
            " set eos_token in its tokenizer_config.json"
        )
    if foreign := _foreign_token(tokenizer, Path(path, "config.json")):
        raise ConfigError(f"{blame}: {foreign}; set a model with a tokenizer of its own")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _foreign_token(tokenizer: PreTrainedTokenizerBase, config: Path) -> str:
    """A token that text can be made of, or that ends it, and that the model does not embed."""
    if not config.is_file():  # of a hub id
        return ""
    read = json.loads(config.read_text())
    embedded = (read.get("text_config") or read).get("vocab_size") or len(tokenizer)
    special = {*tokenizer.all_special_ids} - {tokenizer.eos_token_id}
    for token, index in tokenizer.get_vocab().items() if len(tokenizer) > embedded else ():
        if index >= embedded and index not in special:
            return (
                f"its tokenizer makes token {index} of {token!r}, and the model embeds {embedded} only:"
                " it would be out of range"
            )
    return ""


def read_config(model: ModelConfig, path: str, key: str = "model.path") -> PretrainedConfig:
    """The config.json in `path`, where the setting `key` leads to. Raises ConfigError."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # whatever a config.json, the hub or a model's own code comes up with
        raise unreadable(model, key, error) from error


def refuse_mute(model: ModelConfig, config: PretrainedConfig) -> None:
    """Raises ConfigError for a model that generates no text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as GENERATING

    its_own = "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if config.model_type not in GENERATING and not its_own:
        raise ConfigError(
            f"model.path = {model.path}: is a model of the type {config.model_type}, which generates no text;"
            " set a causal language model"
        )


def context_of(config: PretrainedConfig) -> int | None:
    """How many tokens the model can attend to, where it says so."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def refuse_longer_than_context(run: Run, config: Any) -> None:
    """Raises ConfigError when a prompt and its completion can be longer than the model can attend to."""
    limit = context_of(config)
    if limit is not None and run.max_model_len > limit:
        raise ConfigError(
            f"rollout.max_new_tokens = {run.rollout.max_new_tokens}: with data.max_prompt_tokens"
            f" {run.data.max_prompt_tokens} it comes to {run.max_model_len} tokens, the context of"
            f" {run.model.path} is {limit}; set them so that they fit together"
        )


def unreadable(model: ModelConfig, key: str, error: Exception) -> ConfigError:
    kind = "sequence classifier" if key == "reward_model.path" else "causal language model"
    what = (
        f"its configuration cannot be read: {first_line(error)}; set a directory with the config.json of a"
        f" {kind}, or a hub id that is cached or reachable"
    )
    if "trust_remote_code" in str(error):
        what = "is custom code; " + (
            "set model.trust_remote_code=true to run it, if you trust its authors"
            if key == "model.path"
            else "it would not be run, model.trust_remote_code is for model.path alone; set another model"
        )
    return ConfigError(f"{key} = {model.path}: {what}")
