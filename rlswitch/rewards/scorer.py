"""What the rollouts of a step are worth, and which of them no reward could be had for."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice, product
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from rlswitch.config.sections import TENANTS
from rlswitch.errors import ConfigError, RewardError
from rlswitch.rewards.functions import Completion
from rlswitch.rewards.workers.builtin import ONE_BY_ONE, Settings
from rlswitch.rewards.workers.pool import Answer, Call, Pool
from rlswitch.rewards.workers.resolve import GIVEN
from rlswitch.rewards.workers.worker import shown
from rlswitch.types import Group, Prompt, Rollout

if TYPE_CHECKING:
    from rlswitch.config.sections import RewardConfig

OWN = ("prompt", "completion", *GIVEN)
"""No column of the dataset is passed by one of these names, as in TRL."""
PARTS = 8
"""A call that fails is repeated in so many parts, and a part of it again, down to single rollouts."""
RETRY_TIMEOUTS = 8.0
"""So many times reward.timeout_s may go into that in one step; then what is left has no reward."""
NAMED, CAUSES = 5, 3
"""So many rollouts without a reward are named on the console at a time, so many in a RewardError."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """What a tenant says of one rollout: a score, or why there is none."""

    score: float | None = None
    error: str = ""
    extra: str = ""
    """What it had to say, for rollouts.jsonl."""


@dataclass(kw_only=True, slots=True)
class Scores:
    """What was said about some rollouts, by row and name."""

    rewards: list[dict[str, float]]
    errors: list[dict[str, str]]
    extra: list[dict[str, str]]
    retried: float = 0.0
    """Seconds spent on parts of calls that failed."""
    gave_up: bool = False
    """Too many errors: the rest was not asked any more."""

    def count_errors(self) -> int:
        return sum(map(bool, self.errors))

    def add(self, name: str, marks: Sequence[Mark]) -> None:
        """Notes down what the tenant `name` said, a mark per row."""
        for row, mark in enumerate(marks):
            if mark.score is None:
                self.errors[row][name] = mark.error
            else:
                self.rewards[row][name] = mark.score
            if mark.extra:
                self.extra[row][name] = mark.extra


@dataclass(frozen=True, kw_only=True, slots=True)
class Pending:
    """Groups on their way through the rewards; Scorer.collect waits for the functions."""

    groups: Sequence[Group]
    rollouts: list[Rollout]
    scores: Future[Scores]
    marks: dict[str, list[Mark]] = field(default_factory=dict)
    """By name, of the tenants that have been asked (tenants.py)."""
    is_refill: bool = False
    """Of a step that has most of its groups: these few may all fail."""


class Scorer:
    """The reward functions of a run, in processes of their own.

    Example: `pending = scorer.submit(groups)`, something else meanwhile, `scorer.collect(pending)`
    """

    def __init__(self, config: RewardConfig, say: Callable[[str], None] = print, step_size: int = 0):
        """Starts a worker. Raises ConfigError for what is no function, or cannot be run safely.

        `step_size` is the number of rollouts in a step: what a few errors among fewer are measured against.
        """
        self.say = say
        """Takes the lines for the console: rollouts without a reward, and what functions print."""
        self._config, self._step_size = config, step_size
        self._weights = config.weights or [1.0] * len(config.functions)
        self._entries = [entry for entry in config.functions if entry not in TENANTS]
        self.tenants = [entry for entry in config.functions if entry in TENANTS]
        """Names of the models that have to be asked beside the functions (tenants.py)."""
        problems = [
            f"reward.weights = {config.weights}: {weight} is not a finite number"
            for weight in self._weights
            if not math.isfinite(weight)
        ]
        settings = Settings(
            format_pattern=config.format_pattern,
            timeout_s=config.timeout_s,
            memory_bytes=int(config.memory_gib * 2**30),
            allow_unsandboxed=config.allow_unsandboxed,
        )
        try:
            self._pool = Pool(config.functions, settings, config.workers, lambda line: self.say(line))
        except ConfigError as error:
            problems += error.problems
        else:
            if problems:
                self._pool.close()
        if problems:
            raise ConfigError(*problems)
        # A thread of its own, so that deadlines are kept while this one generates.
        self._thread = ThreadPoolExecutor(1, "rewards")

    def close(self) -> None:
        """Ends the workers, and what they have started."""
        self._pool.stop()
        self._thread.shutdown(cancel_futures=True)
        self._pool.close()

    @property
    def names(self) -> list[str]:
        """What the rewards are called in Rollout.rewards and in the metrics, in their order."""
        functions = iter(self._pool.names)
        return [name if name in TENANTS else next(functions) for name in self._config.functions]

    @property
    def judged_by(self) -> str:
        """Whose score says whether an answer is right: the first function's, or the first tenant's."""
        return (self._pool.names or self.tenants)[0]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise ConfigError where a function cannot be called with the columns of `prompts`."""
        columns = list(dict.fromkeys(name for prompt in prompts for name in prompt.columns))
        problems = [
            f"data.path: column '{name}' has the name of an argument of reward functions; rename it"
            for name in columns
            if name in GIVEN
        ]
        problems += self._pool.check(_passed(columns))
        if problems:
            raise ConfigError(*problems)

    def score(self, groups: Sequence[Group]) -> None:
        """`submit` and `collect` in one."""
        self.collect(self.submit(groups))

    def submit(self, groups: Sequence[Group], is_refill: bool = False) -> Pending:
        """Sends the groups to the reward functions, and returns at once."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        scores = self._thread.submit(self._ask, groups, rollouts)
        return Pending(groups=groups, rollouts=rollouts, scores=scores, is_refill=is_refill)

    def collect(self, pending: Pending) -> None:
        """Fills in `rewards` and `reward`; a rollout without moves to the `failed` of its group.

        Raises RewardError, and changes nothing, when more than reward.max_error_rate have none, or all.
        """
        scores = pending.scores.result()
        for name, marks in pending.marks.items():
            scores.add(name, marks)
        if len(pending.marks) == len(self.tenants):  # else somebody may still have a number
            self._miss(scores)
        self._refuse_too_many(pending.rollouts, scores, pending.is_refill)
        weights = dict(zip(self.names, self._weights, strict=True))
        rows = zip(pending.rollouts, scores.rewards, scores.errors, scores.extra, strict=True)
        for rollout, rewards, errors, extra in rows:
            rollout.errors, rollout.extra = errors, extra
            rollout.rewards = {name: rewards[name] for name in self.names if name in rewards}
            rollout.reward = math.fsum(weights[name] * score for name, score in rollout.rewards.items())
        for group in pending.groups:
            group.failed += [rollout for rollout in group.rollouts if rollout.errors]
            group.rollouts = [rollout for rollout in group.rollouts if not rollout.errors]
        lines = [self._line(*it, rollout) for rollout in pending.rollouts for it in rollout.errors.items()]
        for line in lines[:NAMED]:
            self.say(f"warning: {line}; left out")
        if lines[NAMED:]:
            self.say(f"warning: {len(lines) - NAMED} more rewards could not be had, and were left out")

    def metrics(self, groups: Sequence[Group]) -> dict[str, float]:
        """What the scored groups say: rewards, errors, and lengths in tokens."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        failed = [rollout for group in groups for rollout in group.failed]
        assert rollouts, "no rollouts to describe"
        rewards = [rollout.reward for rollout in rollouts]
        result = {
            "reward/mean": fmean(rewards),
            "reward/std": pstdev(rewards),
            "reward/frac_zero_std": fmean(
                len({rollout.reward for rollout in group.rollouts}) == 1 for group in groups if group.rollouts
            ),
            "reward/error_rate": len(failed) / (len(rollouts) + len(failed)),
        }
        errors = Counter(name for rollout in failed for name in rollout.errors)
        for name in self.names:
            given = [rollout.rewards[name] for rollout in rollouts if name in rollout.rewards]
            if given:
                result |= {f"reward/{name}/mean": fmean(given), f"reward/{name}/std": pstdev(given)}
            result[f"reward/{name}/error_rate"] = errors[name] / (len(rollouts) + len(failed))
        return result | length_metrics(groups)

    def _ask(self, groups: Sequence[Group], rollouts: Sequence[Rollout]) -> Scores:
        """Calls every function on every rollout, and again on parts where that fails."""
        scores = Scores(
            rewards=[{} for _ in rollouts], errors=[{} for _ in rollouts], extra=[{} for _ in rollouts]
        )
        calls = deque(self._first_calls(groups))
        for answer in self._pool.run(calls, lambda rows: _arguments([rollouts[row] for row in rows])):
            if answer.call.after:
                scores.retried += answer.seconds
            calls.extendleft(reversed(self._take(answer, scores)))
            self._give_up(calls, scores)
        return scores

    def _miss(self, scores: Scores) -> None:
        for rewards, errors in zip(scores.rewards, scores.errors, strict=True):
            if not rewards and not errors and not scores.gave_up:
                errors[self.names[0]] = (
                    "returned None, as every function did (leave such rows out of the dataset, or return a"
                    " number)"
                )

    def _first_calls(self, groups: Sequence[Group]) -> Iterable[Call]:
        """Whole groups, one call for each worker; the async functions share theirs."""
        ends = [0]
        for group in groups:
            ends.append(ends[-1] + len(group.rollouts))
        share = math.ceil(len(groups) / self._config.workers) or 1
        chunks = [
            tuple(range(ends[i], ends[min(i + share, len(groups))])) for i in range(0, len(groups), share)
        ]
        waiting = tuple(i for i, is_async in enumerate(self._pool.is_async) if is_async)
        alone = [(i,) for i, is_async in enumerate(self._pool.is_async) if not is_async]
        for functions in [*alone, *filter(None, [waiting])]:
            one_by_one = self._entries[functions[0]] in ONE_BY_ONE
            for rows in [(row,) for row in range(ends[-1])] if one_by_one else chunks:
                if rows:
                    yield Call(functions=functions, rows=rows)

    def _take(self, answer: Answer, scores: Scores) -> list[Call]:
        """Notes down what an answer says; the calls to make because of what it does not say."""
        call = answer.call
        if answer.results is None and len(call.functions) > 1:
            return [Call(functions=(f,), rows=call.rows, after=answer.lost) for f in call.functions]
        results: list[dict[str, Any]] = answer.results or [{"error": answer.lost}]
        again: list[Call] = []
        for function, result in zip(call.functions, results, strict=True):
            name = self._pool.names[function]
            if "error" in result:
                again += self._again(function, call.rows, result["error"], scores)
                continue
            bad = dict(result["bad"])
            for i, row in enumerate(call.rows):
                if i in bad:
                    scores.errors[row][name] = bad[i]
                elif (score := result["scores"][i]) is not None:
                    scores.rewards[row][name] = score
                scores.extra[row] |= {column: values[i] for column, values in result["extra"].items()}
        return again

    def _again(self, function: int, rows: Sequence[int], why: str, scores: Scores) -> list[Call]:
        if len(rows) == 1:
            scores.errors[rows[0]][self._pool.names[function]] = why
            return []
        parts = iter(rows)
        size = math.ceil(len(rows) / PARTS)
        return [
            Call(functions=(function,), rows=part, after=why)
            for part in iter(lambda: tuple(islice(parts, size)), ())
        ]

    def _give_up(self, calls: deque[Call], scores: Scores) -> None:
        """Drops the calls that are not worth making: the step is lost already, or the budget is."""
        scores.gave_up |= scores.count_errors() > self._allowed(len(scores.errors))
        if scores.gave_up:
            calls.clear()
        elif scores.retried > RETRY_TIMEOUTS * self._config.timeout_s:
            for call in [call for call in calls if call.after]:
                calls.remove(call)
                why = f"{call.after} (it or another of {len(call.rows)} that were tried together)"
                for function, row in product(call.functions, call.rows):
                    scores.errors[row].setdefault(self._pool.names[function], why)

    def _allowed(self, rollouts: int) -> float:
        return self._config.max_error_rate * max(rollouts, self._step_size)

    def _refuse_too_many(self, rollouts: Sequence[Rollout], scores: Scores, is_refill: bool) -> None:
        count, limit = scores.count_errors(), self._config.max_error_rate
        all_lost = count == len(rollouts) > 0 and not is_refill
        if count <= self._allowed(len(rollouts)) and not all_lost:
            return
        lines = [
            self._line(name, why, rollout)
            for rollout, errors in zip(rollouts, scores.errors, strict=True)
            for name, why in errors.items()
        ]
        at_least = "at least " if scores.gave_up else ""
        raise RewardError(
            f"{at_least}{count} of {len(rollouts)} rollouts have no reward, more than reward.max_error_rate ="
            f" {limit:g} allows: {'; '.join(lines[:CAUSES])}{'; ...' if lines[CAUSES:] else ''}"
        )

    def _line(self, name: str, why: str, rollout: Rollout) -> str:
        entry = self._config.functions[self.names.index(name)]
        return f"reward '{entry}' {why} for {_row(rollout)}"


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


def _passed(columns: Iterable[str]) -> list[str]:
    return [name for name in columns if name not in OWN]


def _arguments(rollouts: Sequence[Rollout]) -> dict[str, list[Any]]:
    """TRL's keyword arguments, one value per rollout."""
    prompts = [rollout.prompt for rollout in rollouts]
    return {
        "prompts": [prompt.messages for prompt in prompts],
        "completions": [_completion(rollout) for rollout in rollouts],
        "completion_ids": [list(rollout.token_ids) for rollout in rollouts],
        **{name: [prompt.columns[name] for prompt in prompts] for name in _passed(prompts[0].columns)},
    }


def _completion(rollout: Rollout) -> Completion:
    if isinstance(rollout.prompt.messages, str):
        return rollout.text
    return [{"role": "assistant", "content": rollout.text}]


def _row(rollout: Rollout) -> str:
    messages = rollout.prompt.messages
    text = messages if isinstance(messages, str) else messages[-1]["content"]
    return f"row {rollout.prompt.index}, sample {rollout.sample} (prompt {shown(text)})"
