"""Built-in tasks: models and a dataset made on the spot, so that the whole loop runs with no download.

Named `builtin:NAME` in data.path and wherever a model is named. To add one: a module with `load_datasets`
and a line in TASKS; for each model one with `ensure_model` and `build_model` and a line in MODELS.
"""

from rlswitch.options import did_you_mean
from rlswitch.types import ConfigError

TASKS = {"addition": "rlswitch.tasks.addition"}
MODELS = {
    "addition": "rlswitch.tasks.addition",
    "addition-judge": "rlswitch.tasks.addition_judge",
    "addition-reward-model": "rlswitch.tasks.addition_reward_model",
}


def refuse_unknown_task(key: str, path: str) -> None:
    """Raises ConfigError where `path`, the value of `key`, begins with builtin: and there is none such."""
    kind, known = ("task", TASKS) if key.startswith("data.") else ("model", MODELS)
    name = path.removeprefix("builtin:")
    if path.startswith("builtin:") and name not in known:
        there_is = f"(there is {', '.join(known)}){did_you_mean(name, known)}"
        raise ConfigError(f"{key} = {path}: no such built-in {kind} {there_is}")
