"""Built-in tasks: models and a dataset made on the spot, so that the whole loop runs with no download.

Named `builtin:NAME` in data.path and wherever a model is named. To add one: a module with `load_datasets`
and `build_tokenizer`, which does without torch, and a line in TASKS; for each model a module with
`ensure_model` and `build_model`, and a line in MODELS.
"""

import importlib
from types import ModuleType

from rlswitch.config.fields import did_you_mean
from rlswitch.errors import ConfigError

TASKS = {"addition": "rlswitch.recipes.addition.task"}
MODELS = {
    "addition": "rlswitch.recipes.addition.policy",
    "addition-judge": "rlswitch.recipes.addition.judge",
    "addition-reward-model": "rlswitch.recipes.addition.reward_model",
}
"""By a name that is its task's, or begins with it: they have one tokenizer."""


def task_of(path: str) -> ModuleType | None:
    """The task of `builtin:NAME`, a task or a model of its; None for any other path."""
    if not path.startswith("builtin:"):
        return None
    return importlib.import_module(TASKS[path.removeprefix("builtin:").partition("-")[0]])


def refuse_unknown_task(key: str, path: str) -> None:
    """Raises ConfigError where `path`, the value of `key`, begins with builtin: and there is none such."""
    kind, known = ("task", TASKS) if key.startswith("data.") else ("model", MODELS)
    name = path.removeprefix("builtin:")
    if path.startswith("builtin:") and name not in known:
        there_is = f"(there is {', '.join(known)}){did_you_mean(name, known)}"
        raise ConfigError(f"{key} = {path}: no such built-in {kind} {there_is}")
