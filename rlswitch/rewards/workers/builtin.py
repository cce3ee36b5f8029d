"""The table of built-in reward functions, which reward.functions names without a module or a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rlswitch.config.sections import RewardConfig
from rlswitch.errors import ConfigError
from rlswitch.rewards.functions import Format, exact_match, length, math
from rlswitch.rewards.sandbox.code import CodeReward
from rlswitch.rewards.sandbox.sandbox import PATIENCE, Limits, Sandbox, SandboxError

ONE_BY_ONE = {"code"}
"""Built-in functions that score one rollout per call: a program may use up the whole timeout."""


def make_format(config: RewardConfig) -> Format:
    assert config.format_pattern is not None, "command/checks.py requires it"
    return Format(config.format_pattern)


def make_code(config: RewardConfig) -> CodeReward:
    limits = Limits(
        seconds=min(10.0, config.timeout_s / (2 * PATIENCE)), memory_bytes=int(config.memory_gib * 2**30)
    )
    try:
        sandbox = Sandbox(limits, config.allow_unsandboxed)
    except SandboxError as error:
        raise ConfigError(
            f"reward.functions = code: {error}; what the model writes would run with this user's rights and"
            " network; allow namespaces (containers: --security-opt seccomp=unconfined), or set"
            " reward.allow_unsandboxed=true to run it under limits only"
        ) from error
    if sandbox.missing:
        print(f"warning: reward.allow_unsandboxed: programs run under limits only: {sandbox.missing}")
    return CodeReward(sandbox)


BUILTIN: Mapping[str, Callable[[RewardConfig], Callable[..., Any]]] = {
    "exact_match": lambda config: exact_match,
    "math": lambda config: math,
    "format": make_format,
    "length": lambda config: length,
    "code": make_code,
}
"""How to make each, by name."""
