"""Built-in tasks: a model and a dataset made on the spot, so that the whole loop runs with no download.

Named `builtin:<module>` in model.path and data.path. To add one: a module with `load_datasets`,
`ensure_model` and `build_model`, and a line in BUILTIN.
"""

from rlswitch.options import did_you_mean
from rlswitch.types import ConfigError

BUILTIN = {"addition": "rlswitch.tasks.addition"}


def refuse_unknown_task(key: str, path: str) -> None:
    """Raises ConfigError where `path`, the value of `key`, begins with builtin: and there is no such task."""
    name = path.removeprefix("builtin:")
    if path.startswith("builtin:") and name not in BUILTIN:
        known = f"(there is {', '.join(BUILTIN)}){did_you_mean(name, BUILTIN)}"
        raise ConfigError(f"{key} = {path}: no such built-in task {known}")
