"""Call the reward functions on a step's rollouts, and refuse what is not one number per rollout."""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import inspect
import math
import sys
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import fmean, pstdev
from types import ModuleType
from typing import TYPE_CHECKING, Any, SupportsFloat

from rlswitch.options import did_you_mean
from rlswitch.rewards.functions import BUILTIN, Completion
from rlswitch.types import ConfigError, Group, Prompt, RewardError, Rollout

if TYPE_CHECKING:
    from rlswitch.config import RewardConfig

_GIVEN = ("prompts", "completions", "completion_ids")
_OWN = ("prompt", "completion", *_GIVEN)
"""No column of the dataset is passed by one of these names, as in TRL."""


@dataclass(frozen=True, slots=True)
class _Function:
    name: str
    """What its metrics are called by."""
    entry: str
    """Its entry in reward.functions."""
    call: Callable[..., Any]
    weight: float

    @property
    def is_async(self) -> bool:
        call = self.call
        return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(
            getattr(call, "__call__", None)  # noqa: B004  (an object with an async __call__)
        )


class Scorer:
    """The reward functions of a run, resolved and checked by name at construction."""

    def __init__(self, config: RewardConfig):
        weights = config.weights or [1.0] * len(config.functions)
        problems = [
            f"reward.weights = {config.weights}: {weight} is not a finite number"
            for weight in weights
            if not math.isfinite(weight)
        ]
        self._functions: list[_Function] = []
        for entry, weight in zip(config.functions, weights, strict=True):
            try:
                name, call = _resolve(entry)
            except ConfigError as error:
                problems += error.problems
            else:
                unique = _unique(name, [other.name for other in self._functions])
                self._functions.append(_Function(unique, entry, call, weight))
        if problems:
            raise ConfigError(*problems)
        # One event loop for all steps: a client that a function keeps is bound to its first one
        self._runner = asyncio.Runner()

    def close(self) -> None:
        """Ends the event loop of the async functions."""
        self._runner.close()

    @property
    def names(self) -> list[str]:
        """What the functions are called in Rollout.rewards and in the metrics, in their order."""
        return [function.name for function in self._functions]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise ConfigError where a function cannot be called with the columns of `prompts`."""
        columns = list(dict.fromkeys(name for prompt in prompts for name in prompt.columns))
        passed = _passed(columns)
        problems = [
            f"data.path: column '{name}' has the name of an argument of reward functions; rename it"
            for name in columns
            if name in _GIVEN
        ]
        for function in self._functions:
            try:
                # a C function has no signature (ValueError): its first call will tell
                with suppress(ValueError):
                    inspect.signature(function.call).bind(**dict.fromkeys((*_GIVEN, *passed)))
            except TypeError as error:
                problems.append(
                    f"reward.functions = {function.entry}: cannot be called ({error}); it gets"
                    f" {', '.join((*_GIVEN, *passed))}; let it take the unnamed as **columns"
                )
        if problems:
            raise ConfigError(*problems)

    def score(self, groups: Sequence[Group]) -> None:
        """Fill `rewards` and `reward` of every rollout, or raise RewardError and fill nothing."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        if not rollouts:
            return
        returned = self._call_all(rollouts)
        scores = [
            _numbers(function, result, rollouts)
            for function, result in zip(self._functions, returned, strict=True)
        ]
        for rollout, row in zip(rollouts, zip(*scores, strict=True), strict=True):
            if all(score is None for score in row):
                raise RewardError(
                    f"no reward for {_row(rollout)}: {', '.join(self.names)} returned None;"
                    " leave such rows out of the dataset, or return a number"
                )
        for rollout, row in zip(rollouts, zip(*scores, strict=True), strict=True):
            given = [(f, x) for f, x in zip(self._functions, row, strict=True) if x is not None]
            rollout.rewards = {function.name: score for function, score in given}
            rollout.reward = math.fsum(function.weight * score for function, score in given)

    def metrics(self, groups: Sequence[Group]) -> dict[str, float]:
        """What the scored groups say: rewards, and lengths in tokens."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        assert rollouts, "no rollouts to describe"
        rewards = [rollout.reward for rollout in rollouts]
        result = {
            "reward/mean": fmean(rewards),
            "reward/std": pstdev(rewards),
            "reward/frac_zero_std": fmean(
                len({rollout.reward for rollout in group.rollouts}) == 1 for group in groups
            ),
            "reward/error_rate": 0.0,  # an error stops the run
        }
        for name in self.names:
            given = [rollout.rewards[name] for rollout in rollouts if name in rollout.rewards]
            if given:
                result[f"reward/{name}/mean"] = fmean(given)
        return result | length_metrics(groups)

    def _call_all(self, rollouts: Sequence[Rollout]) -> list[Any]:
        """What each function returns, in their order; the async ones run together."""
        results: dict[str, Any] = {}
        for function in self._functions:
            if not function.is_async:
                with _blaming(function):
                    results[function.name] = function.call(**_arguments(rollouts))

        async def call(function: _Function) -> None:
            with _blaming(function):
                results[function.name] = await function.call(**_arguments(rollouts))

        async def gather() -> None:
            await asyncio.gather(*(call(f) for f in self._functions if f.is_async))

        if any(function.is_async for function in self._functions):
            self._runner.run(gather())
        return [results[name] for name in self.names]


def length_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Lengths in tokens of completions and prompts, and the share of completions cut off."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    responses = [len(rollout.token_ids) for rollout in rollouts]
    prompts = [len(group.prompt.token_ids) for group in groups]
    return {
        "response_length/mean": fmean(responses),
        "response_length/max": float(max(responses)),
        "response_length/min": float(min(responses)),
        "response_length/clip_ratio": fmean(r.finish_reason == "length" for r in rollouts),
        "prompt_length/mean": fmean(prompts),
        "prompt_length/max": float(max(prompts)),
    }


# ---- calling


@contextmanager
def _blaming(function: _Function) -> Iterator[None]:
    """Turn what the function raises into a RewardError that says which function, and where."""
    try:
        yield
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise RewardError(
            f"reward '{function.entry}' raised {type(error).__name__}: {error}"
            f" (at {Path(last.filename).name}:{last.lineno})"
        ) from error


def _passed(columns: Iterable[str]) -> list[str]:
    return [name for name in columns if name not in _OWN]


def _arguments(rollouts: Sequence[Rollout]) -> dict[str, list[Any]]:
    """TRL's keyword arguments, one value per rollout.

    A copy for every call: a function that edits a message in place must not edit the dataset.
    """
    prompts = [rollout.prompt for rollout in rollouts]
    shared = {name: [p.columns[name] for p in prompts] for name in _passed(prompts[0].columns)}
    return {
        **copy.deepcopy({"prompts": [prompt.messages for prompt in prompts], **shared}),
        "completions": [_completion(rollout) for rollout in rollouts],
        "completion_ids": [list(rollout.token_ids) for rollout in rollouts],
    }


def _completion(rollout: Rollout) -> Completion:
    if isinstance(rollout.prompt.messages, str):
        return rollout.text
    return [{"role": "assistant", "content": rollout.text}]


def _numbers(function: _Function, result: Any, rollouts: Sequence[Rollout]) -> list[float | None]:
    """What a function returned as finite floats, None where it does not apply."""
    blame = f"reward '{function.entry}' returned"
    if isinstance(result, str | bytes | Mapping) or not isinstance(result, Iterable):
        raise RewardError(f"{blame} {_shown(result)}, expected a list of {len(rollouts)} numbers")
    with _blaming(function):  # it may be a generator
        values = list(result)
    if len(values) != len(rollouts):
        raise RewardError(f"{blame} {len(values)} rewards for {len(rollouts)} completions")
    scores = [None if value is None else _float(value) for value in values]
    for value, score, rollout in zip(values, scores, rollouts, strict=True):
        if score is not None and not math.isfinite(score):
            raise RewardError(f"{blame} {_shown(value)} for {_row(rollout)}, expected a number")
    return scores


def _float(value: Any) -> float:
    """The number that `value` is; nan when it is none (a string is none)."""
    if not isinstance(value, SupportsFloat):
        return math.nan
    try:
        return float(value)
    except Exception:  # an array of many elements, an integer beyond the range of floats
        return math.nan


def _row(rollout: Rollout) -> str:
    messages = rollout.prompt.messages
    text = messages if isinstance(messages, str) else messages[-1]["content"]
    return f"row {rollout.prompt.index}, sample {rollout.sample} (prompt {_shown(text)})"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---- finding


def _resolve(entry: str) -> tuple[str, Callable[..., Any]]:
    """The name and the function of an entry of reward.functions."""
    blame = f"reward.functions = {entry}:"
    place, colon, name = entry.rpartition(":")
    if not colon and entry in BUILTIN:
        return entry, BUILTIN[entry]
    if not colon:
        known = f"{', '.join(BUILTIN)}{did_you_mean(entry, BUILTIN)}"
        what = "no function named" if entry.endswith(".py") else "no such built-in function"
        raise ConfigError(
            f"{blame} {what}; give a built-in one ({known}), package.module:function, or file.py:function"
        )
    if place.endswith(".py") and not Path(place).expanduser().is_file():
        raise ConfigError(f"{blame} no such file '{place}' in {Path.cwd()}")
    try:
        module = _load_file(Path(place).expanduser()) if place.endswith(".py") else import_module(place)
    except (Exception, SystemExit) as error:  # whatever a user's module does when it is run
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{blame} cannot import '{place}' ({what})") from error
    call = getattr(module, name, None)
    if call is None:
        hint = did_you_mean(name, [key for key, value in vars(module).items() if callable(value)])
        raise ConfigError(f"{blame} '{place}' has no '{name}'{hint}")
    if not callable(call) or inspect.isclass(call):
        raise ConfigError(f"{blame} is a {type(call).__name__}; name a function")
    return name, call


def _load_file(path: Path) -> ModuleType:
    """The module in a file, run once per process however many functions it gives."""
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


def _unique(name: str, taken: Sequence[str]) -> str:
    """`name`, or name_2, name_3, ... when an earlier function has it."""
    unique, n = name, 1
    while unique in taken:
        n += 1
        unique = f"{name}_{n}"
    return unique
