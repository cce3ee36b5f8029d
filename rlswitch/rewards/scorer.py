"""The reward functions of a run, and the weighted sum that becomes a rollout's reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

from rlswitch.config.sections import TENANTS, RewardConfig
from rlswitch.errors import ConfigError, RewardError
from rlswitch.rewards.functions import Completion
from rlswitch.rewards.scores import Pending, Scores
from rlswitch.rewards.workers.builtin import Settings
from rlswitch.rewards.workers.pool import Pool
from rlswitch.rewards.workers.resolve import GIVEN
from rlswitch.text import shortened
from rlswitch.types import Group, Prompt, Rollout

RESERVED = ("prompt", "completion", *GIVEN)
"""Columns of the dataset with these names are not passed to functions, as in TRL."""
NAMED, CAUSES = 5, 3
"""How many rollouts without a reward the console names at a time; how many causes a RewardError lists."""
NOTHING_APPLIES = (
    "returned None, as every function did (leave such rows out of the dataset, or return a number)"
)


class Scorer:
    """Calls the reward functions, in worker processes, and adds up what they and the tenants return.

    Example: `pending = scorer.submit(groups)`, something else meanwhile, `scorer.collect(pending)`
    """

    def __init__(
        self,
        config: RewardConfig,
        log: Callable[[str], None] = print,
        step_size: int = 0,
        max_new_tokens: int = 0,
    ):
        """Starts a worker. Raises ConfigError for an entry that is not a function or cannot run safely.

        step_size: rollouts of a step. reward.max_error_rate is a share of it where fewer are scored.
        max_new_tokens: rollout.max_new_tokens, whose last reward.overlong_buffer tokens are punished.
        """
        self.log = log
        """Prints a line on the console: warnings, and what functions print."""
        self._config, self._step_size, self._max_new_tokens = config, step_size, max_new_tokens
        self._weights = config.weights or [1.0] * len(config.functions)
        self.tenants = tuple(entry for entry in config.functions if entry in TENANTS)
        """Names of the models among the rewards."""
        functions = [entry for entry in config.functions if entry not in TENANTS]
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
            taken_names=self.tenants,
        )
        try:
            self._pool = Pool(functions, settings, config.workers, lambda line: self.log(line))
        except ConfigError as error:
            problems += error.problems
        else:
            if problems:
                self._pool.close()
        if problems:
            raise ConfigError(*problems)
        # Its own thread: it enforces the timeouts while the main thread generates.
        self._thread = ThreadPoolExecutor(1, "rewards")

    def close(self) -> None:
        """Ends the workers and every process that they started."""
        self._pool.stop()
        self._thread.shutdown(cancel_futures=True)
        self._pool.close()

    @property
    def names(self) -> list[str]:
        """The rewards as Rollout.rewards and the metrics name them, in the order of reward.functions."""
        functions = iter(self._pool.names)
        return [name if name in self.tenants else next(functions) for name in self._config.functions]

    @property
    def correctness(self) -> str:
        """The reward that decides whether an answer is correct: the first function, else the first tenant."""
        return [*self._pool.names, *self.tenants][0]

    def check_columns(self, prompts: Sequence[Prompt]) -> None:
        """Raises ConfigError where a function cannot be called with the columns of `prompts`."""
        columns = list(dict.fromkeys(name for prompt in prompts for name in prompt.columns))
        problems = [
            f"data.path: column '{name}' has the name of an argument of reward functions; rename it"
            for name in columns
            if name in GIVEN
        ]
        problems += self._pool.signature_problems(_passed(columns))
        if problems:
            raise ConfigError(*problems)

    def score(self, groups: Sequence[Group]) -> None:
        """`submit` and `collect` in one."""
        self.collect(self.submit(groups))

    def submit(self, groups: Sequence[Group]) -> Pending:
        """Sends the groups to the reward functions and returns at once."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        scores = self._thread.submit(self._call_functions, groups, rollouts)
        return Pending(groups=groups, rollouts=rollouts, scores=scores)

    def collect(self, pending: Pending, may_all_fail: bool = False) -> None:
        """Waits for the functions, then fills in `rewards` and `reward` of every rollout.

        A rollout without a reward moves to the `failed` of its group. Raises RewardError, and changes
        nothing, when more than reward.max_error_rate have none, or all unless `may_all_fail`.
        """
        scores = pending.scores.result()
        for name, of_tenant in pending.by_tenant.items():
            for row, score in enumerate(of_tenant):
                scores.add(name, row, score)
        if len(pending.by_tenant) == len(self.tenants) and not scores.stopped_early:
            for values, errors in zip(scores.values, scores.errors, strict=True):
                if not values and not errors:
                    errors[self.names[0]] = NOTHING_APPLIES
        self._check_error_rate(pending.rollouts, scores, may_all_fail)
        rows = zip(pending.rollouts, scores.values, scores.errors, scores.extra, strict=True)
        for rollout, values, errors, extra in rows:
            rollout.errors, rollout.extra = errors, extra
            rollout.rewards = {name: values[name] for name in self.names if name in values}
            rollout.reward = self._total(rollout)
        for group in pending.groups:
            group.failed += [rollout for rollout in group.rollouts if rollout.errors]
            group.rollouts = [rollout for rollout in group.rollouts if not rollout.errors]
        lines = list(self._error_lines(pending.rollouts, scores))
        for line in lines[:NAMED]:
            self.log(f"warning: {line}; left out")
        if lines[NAMED:]:
            self.log(f"warning: {len(lines) - NAMED} more rewards failed and were left out")

    def _total(self, rollout: Rollout) -> float:
        """The weighted sum of a rollout's rewards, less what an overlong completion costs."""
        weights = dict(zip(self.names, self._weights, strict=True))
        total = math.fsum(weights[name] * value for name, value in rollout.rewards.items())
        if not self._config.overlong_buffer:
            return total
        return total - overlong_penalty(
            len(rollout.token_ids), self._max_new_tokens, self._config.overlong_buffer
        )

    def _call_functions(self, groups: Sequence[Group], rollouts: Sequence[Rollout]) -> Scores:
        scores = Scores(len(rollouts))
        sizes = [len(group.rollouts) for group in groups]
        results = self._pool.map(sizes, lambda rows: _arguments([rollouts[row] for row in rows]))
        with closing(results):
            for name, row, score in results:
                scores.add(name, row, score)
                if scores.count_errors() > self._allowed_errors(len(rollouts)):
                    scores.stopped_early = True
                    break
        return scores

    def _allowed_errors(self, rollouts: int) -> float:
        return self._config.max_error_rate * max(rollouts, self._step_size)

    def _check_error_rate(self, rollouts: Sequence[Rollout], scores: Scores, may_all_fail: bool) -> None:
        count = scores.count_errors()
        all_failed = count == len(rollouts) > 0 and not may_all_fail
        if count <= self._allowed_errors(len(rollouts)) and not all_failed:
            return
        lines = list(self._error_lines(rollouts, scores))
        at_least = "at least " if scores.stopped_early else ""
        raise RewardError(
            f"{at_least}{count} of {len(rollouts)} rollouts have no reward, more than reward.max_error_rate ="
            f" {self._config.max_error_rate:g} allows: {'; '.join(lines[:CAUSES])}"
            f"{'; ...' if lines[CAUSES:] else ''}"
        )

    def _error_lines(self, rollouts: Sequence[Rollout], scores: Scores) -> Iterable[str]:
        for rollout, errors in zip(rollouts, scores.errors, strict=True):
            messages = rollout.prompt.messages
            text = messages if isinstance(messages, str) else messages[-1]["content"]
            row = f"row {rollout.prompt.index}, sample {rollout.sample} (prompt {shortened(repr(text), 60)})"
            for name, why in errors.items():
                yield f"reward '{self._config.functions[self.names.index(name)]}' {why} for {row}"


def overlong_penalty(length: int, max_length: int, buffer: int) -> float:
    """0 for a completion that leaves the last `buffer` of `max_length` tokens unused, 1 for the longest.

    Source: DAPO's soft overlong punishment (arXiv:2503.14476, equation 13).
    """
    return min(max((length - (max_length - buffer)) / buffer, 0.0), 1.0)


def _passed(columns: Iterable[str]) -> list[str]:
    return [name for name in columns if name not in RESERVED]


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
