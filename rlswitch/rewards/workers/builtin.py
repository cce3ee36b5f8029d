"""What reward.functions can name without a module or a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rlswitch.errors import ConfigError
from rlswitch.rewards.functions import Format, exact_match, length, math
from rlswitch.rewards.sandbox.code import CodeReward
from rlswitch.rewards.sandbox.sandbox import PATIENCE, Limits, Sandbox, SandboxError

ONE_BY_ONE = {"code"}
"""Built-in functions that are given a rollout a call: a program may use up a whole deadline."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the built-in functions need to know of the run's configuration."""

    format_pattern: str | None
    timeout_s: float
    memory_bytes: int
    allow_unsandboxed: bool


def make_format(settings: Settings) -> Format:
    assert settings.format_pattern is not None, "checks.py asks for it"
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
"""The table of them: how each is made, by name."""
