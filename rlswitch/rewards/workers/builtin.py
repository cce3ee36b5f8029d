"""The table of built-in reward functions, which reward.functions names without a module or a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rlswitch.errors import ConfigError
from rlswitch.rewards.functions import Format, exact_match, length, math
from rlswitch.rewards.sandbox.code import CodeReward
from rlswitch.rewards.sandbox.sandbox import PATIENCE, Limits, Sandbox, SandboxError

ONE_BY_ONE = {"code"}
"""Built-in functions that score one rollout per call: a program may use up the whole timeout."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the functions depend on beside their entries in reward.functions."""

    format_pattern: str | None
    timeout_s: float
    memory_bytes: int
    allow_unsandboxed: bool
    taken_names: tuple[str, ...] = ()
    """Of the tenants: a function with such a name gets a suffix."""


def make_format(settings: Settings) -> Format:
    assert settings.format_pattern is not None, "command/checks.py requires it"
    return Format(settings.format_pattern)


def make_code(settings: Settings) -> CodeReward:
    limits = Limits(
        seconds=min(10.0, settings.timeout_s / (2 * PATIENCE)), memory_bytes=settings.memory_bytes
    )
    try:
        sandbox = Sandbox(limits, settings.allow_unsandboxed)
    except SandboxError as error:
        raise ConfigError(
            f"reward.functions = code: {error}; what the model writes would run with this user's rights and"
            " network; allow namespaces (containers: --security-opt seccomp=unconfined), or set"
            " reward.allow_unsandboxed=true to run it under limits only"
        ) from error
    if sandbox.missing:
        print(f"warning: reward.allow_unsandboxed: programs run under limits only: {sandbox.missing}")
    return CodeReward(sandbox)


BUILTIN: Mapping[str, Callable[[Settings], Callable[..., Any]]] = {
    "exact_match": lambda settings: exact_match,
    "math": lambda settings: math,
    "format": make_format,
    "length": lambda settings: length,
    "code": make_code,
}
"""How to make each, by name."""
