"""What reward.functions can name without a module or a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rlswitch.rewards.code import CodeReward
from rlswitch.rewards.functions import Format, exact_match, length, math
from rlswitch.rewards.sandbox import PATIENCE, Limits, Sandbox, SandboxError
from rlswitch.types import ConfigError

ONE_BY_ONE = {"code"}
"""Built-in functions that are given a rollout a call: a program may use up a whole deadline."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the built-in functions need to know of the run's configuration."""

    format_pattern: str | None
    timeout_s: float
    memory_bytes: int
    allow_unsandboxed: bool


def builtin(settings: Settings) -> Mapping[str, Callable[[], Callable[..., Any]]]:
    """The table of them: how each is made, by name."""
    return {
        "exact_match": lambda: exact_match,
        "math": lambda: math,
        "format": lambda: make_format(settings),
        "length": lambda: length,
        "code": lambda: make_code(settings),
    }


def make_format(settings: Settings) -> Format:
    if settings.format_pattern is None:
        raise ConfigError(
            "reward.format_pattern = null: the reward 'format' has nothing to ask for; set a regular"
            " expression that a whole completion has to match"
        )
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
