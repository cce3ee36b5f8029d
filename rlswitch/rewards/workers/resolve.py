"""Finds the functions that reward.functions names, built-in or not, and what they can be called with."""

import importlib.util
import inspect
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import chain, count
from pathlib import Path
from types import ModuleType
from typing import Any

from rlswitch.config.fields import did_you_mean
from rlswitch.config.sections import TENANTS, RewardConfig
from rlswitch.data.rows import nearest_file
from rlswitch.errors import ConfigError
from rlswitch.rewards.functions import Format, exact_match, length, math
from rlswitch.rewards.sandbox.code import CodeReward
from rlswitch.rewards.sandbox.sandbox import PATIENCE, Limits, Sandbox, SandboxError

GIVEN = ("prompts", "completions", "completion_ids")
"""Arguments of every function, beside the dataset's columns."""
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


@dataclass(frozen=True, slots=True)
class Function:
    """One entry of reward.functions, found."""

    name: str
    entry: str
    call: Callable[..., Any]

    @property
    def is_async(self) -> bool:
        calls = (self.call, getattr(self.call, "__call__", None))  # noqa: B004  (an object's may be async)
        return any(map(inspect.iscoroutinefunction, calls))

    def signature_problem(self, columns: Sequence[str]) -> str | None:
        """Why it cannot be called with these columns of the dataset, or None."""
        try:
            # a C function has no signature (ValueError): its first call shows
            with suppress(ValueError):
                inspect.signature(self.call).bind(**dict.fromkeys((*GIVEN, *columns)))
        except TypeError as error:
            return (
                f"reward.functions = {self.entry}: cannot be called ({error}); it gets"
                f" {', '.join((*GIVEN, *columns))}; let it take the unnamed as **columns"
            )
        return None

    def takes(self, name: str) -> bool:
        with suppress(ValueError):
            parameters = inspect.signature(self.call).parameters.values()
            return any(it.name == name or it.kind is it.VAR_KEYWORD for it in parameters)
        return False


def resolve(entries: Sequence[str], config: RewardConfig) -> tuple[list[Function], list[str]]:
    """The functions under unique names, and a line for each entry that is not one."""
    functions: list[Function] = []
    problems: list[str] = []
    tenants = TENANTS.keys() & config.functions
    for entry in entries:
        try:
            name, call = _find(entry, config)
        except ConfigError as error:
            problems += error.problems
        else:
            unique = _unique(name, tenants | {other.name for other in functions})
            functions.append(Function(unique, entry, call))
    return functions, problems


def _find(entry: str, config: RewardConfig) -> tuple[str, Callable[..., Any]]:
    blame = f"reward.functions = {entry}:"
    check_exists(entry)
    place, colon, name = entry.rpartition(":")
    if not colon:
        return entry, BUILTIN[entry](config)
    try:
        module = _load_file(Path(place).expanduser()) if place.endswith(".py") else import_module(place)
        call = getattr(module, name, None)
    except (Exception, SystemExit) as error:  # anything can happen while a user's module runs
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{blame} cannot import '{place}' ({what})") from error
    if call is None:
        hint = did_you_mean(name, [key for key, value in vars(module).items() if callable(value)])
        raise ConfigError(f"{blame} '{place}' has no '{name}'{hint}")
    if not callable(call) or inspect.isclass(call):
        raise ConfigError(f"{blame} is a {type(call).__name__}; name a function")
    return name, call


def check_exists(entry: str) -> None:
    """Raises ConfigError for an unknown name and a missing file; runs nothing."""
    blame = f"reward.functions = {entry}:"
    place, colon, _ = entry.rpartition(":")
    names = [*BUILTIN, *TENANTS]
    if not colon and entry not in names:
        known = f"{', '.join(names)}{did_you_mean(entry, names)}"
        what = "no function named" if entry.endswith(".py") else "no such built-in function"
        raise ConfigError(
            f"{blame} {what}; give a built-in one ({known}), package.module:function, or file.py:function"
        )
    file = Path(place).expanduser()
    if file.suffix == ".py" and not file.is_file():
        raise ConfigError(f"{blame} no such file '{place}' in {Path.cwd()}{nearest_file(file)}")


def _load_file(path: Path) -> ModuleType:
    """The module in a file, executed once per process."""
    path = path.resolve()
    name = f"rlswitch_reward_{path.stem}_{zlib.crc32(bytes(path)):08x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look their module up by its name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _unique(name: str, taken: Set[str]) -> str:
    """`name`, or name_2, name_3, ... when an earlier function has it."""
    names = chain([name], (f"{name}_{n}" for n in count(2)))
    return next(it for it in names if it not in taken)
