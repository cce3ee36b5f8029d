"""Built-in tasks: models and a dataset made on the spot, so that the whole loop runs without a download.

`builtin:NAME` stands for one in data.path and wherever a model is named. To add a task, write a module with
`load_datasets` and `build_tokenizer` (neither may import torch) and add it to TASKS; for each of its models,
write a module with `ensure_model` and `build_model` and add it to MODELS.
"""

from importlib import import_module
from types import ModuleType

from rlswitch.config.fields import did_you_mean
from rlswitch.errors import ConfigError

TASKS = {"addition": "rlswitch.recipes.addition.task"}
MODELS = {
    "addition": "rlswitch.recipes.addition.policy",
    "addition-judge": "rlswitch.recipes.addition.judge",
    "addition-reward-model": "rlswitch.recipes.addition.reward_model",
}
"""A model's name is its task's name or begins with it: they share a tokenizer."""


def task_of(path: str) -> ModuleType | None:
    """The task that `builtin:NAME` belongs to, as data or as a model; None for any other path."""
    if not path.startswith("builtin:"):
        return None
    return import_module(TASKS[path.removeprefix("builtin:").partition("-")[0]])


def builtin_model(path: str, key: str = "model.path") -> ModuleType | None:
    """The module that makes `builtin:NAME`; None for any other path. Raises ConfigError if there is none."""
    check_builtin(key, path)
    return import_module(MODELS[path.removeprefix("builtin:")]) if path.startswith("builtin:") else None


def check_builtin(key: str, path: str) -> None:
    """Raises ConfigError if `path`, the value of the setting `key`, names an unknown built-in."""
    kind, known = ("task", TASKS) if key.startswith("data.") else ("model", MODELS)
    name = path.removeprefix("builtin:")
    if path.startswith("builtin:") and name not in known:
        available = f"(available: {', '.join(known)}){did_you_mean(name, known)}"
        raise ConfigError(f"{key} = {path}: no such built-in {kind} {available}")
