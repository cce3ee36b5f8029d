"""Which settings decide a run's numbers. A checkpoint keeps them: resumed with others, it is another run.

Whatever is not listed in FREE decides, a new setting included, until somebody gives a reason here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rlswitch.records.provenance import redacted, resolved
from rlswitch.run import OPTIONS, Run

FREE = {
    "how long a run is, where it is kept and who is told": (
        *("num_steps", "recipe", "output_dir", "resume", "mode", "logger", "project"),
        "checkpoint",
    ),
    "an evaluation has its own seeds and leaves nothing behind, neither weights nor prefixes": (
        "evaluation",
    ),
    "every push is the same weights, whichever way they take; a sampled token does not know": (
        *("switch", "judge.level", "reward_model.level"),
    ),
    "where tensors lie while others compute": ("trainer.park",),
    "how the engine is started and reached; the local one and a server sample the same": (
        *("engine.start_timeout_s", "engine.fork_server", "engine.listen", "engine.url"),
        *("engine.allow_remote", "engine.request_timeout_s", "engine.max_restarts"),
    ),
    "limits of the processes that compute rewards, not what they compute": (
        *("reward.workers", "reward.timeout_s", "reward.memory_gib", "reward.max_error_rate"),
        "reward.allow_unsandboxed",
    ),
    "a permission": ("model.trust_remote_code",),
    "another model is refused whatever is allowed": ("model.path",),
}
"""Settings, or sections, that may change between a save and the resume; with the reason."""

OPEN = ("engine.vllm.", "trainer.lr_schedule_kwargs.")
"""Where a key that is missing was not given. Elsewhere it is one that another version, or algorithm, has."""
NOT_SET = "not set"
EVALUATES = "evaluation.every"
"""Decides, where it does, by being 0 or not."""


def deciding(run: Run) -> dict[str, Any]:
    """The settings that decide the numbers, by dotted key, as JSON gives them back; without secrets."""
    flat = dict(_flattened(redacted(resolved(run))))
    found = {key: value for key, value in flat.items() if not _is_free(key)}
    if run.data.cuts_held_out_rows:  # off the training rows, and only if there are evaluations
        found[EVALUATES] = run.evaluation.every
    return found


def changes(saved: Mapping[str, Any], run: Run) -> list[tuple[str, str, str]]:
    """Key, old and new value of every deciding setting that is not as it was saved."""
    now = deciding(run)
    keys = [key for key in now if key in saved or key.startswith(OPEN)]
    keys += [key for key in saved if key not in now and key.startswith(OPEN)]
    return [
        (key.removesuffix(".class"), _text(key, saved), _text(key, now))
        for key in keys
        if not _same(key, saved.get(key), now.get(key))
    ]


def _same(key: str, old: Any, new: Any) -> bool:
    return bool(old) == bool(new) if key == EVALUATES else old == new


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for keys in FREE.values() for free in keys)


def _flattened(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _text(key: str, settings: Mapping[str, Any]) -> str:
    """As a user writes it."""
    if key not in settings:
        return NOT_SET
    value = settings[key]
    if key == "algorithm.class":
        return next((name for name, it in OPTIONS["algorithm"].items() if it.__name__ == value), str(value))
    return value if isinstance(value, str) else json.dumps(value)
