"""The rewards of a run: functions in worker processes, models on the device, and their weighted sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from rlswitch.config.sections import TENANTS, RewardConfig
from rlswitch.errors import ConfigError, RewardError
from rlswitch.rewards.functions import last_message
from rlswitch.rewards.models.tenant import RewardTenant
from rlswitch.rewards.workers.pool import NamedScore, Pool
from rlswitch.rewards.workers.resolve import GIVEN
from rlswitch.text import shortened
from rlswitch.types import Group, Rollout, Score

if TYPE_CHECKING:  # loads torch
    from rlswitch.switch.switch import Switch

RESERVED = ("prompt", "completion", *GIVEN)
"""Columns of the dataset with these names are not passed to functions, as in TRL."""
NAMED, CAUSES = 5, 3
"""How many rollouts without a reward the console names at a time; how many causes a RewardError lists."""
NOTHING_APPLIES = (
    "returned None, as every function did (leave such rows out of the dataset, or return a number)"
)


Scores = dict[str, Score]
"""Of one rollout, by name of the reward."""


class Pending(NamedTuple):
    """Groups that the functions are scoring."""

    groups: Sequence[Group]
    rollouts: list[Rollout]
    calls: list[Future[list[NamedScore]]]


class Rewards:
    """The reward functions of a run and, once they are started, the models among its rewards.

    Example: `rewards.score(groups, switch)`
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
        self.tenants: Sequence[RewardTenant] = ()
        """The started models, in the order of reward.functions."""
        self._config, self._step_size, self._max_new_tokens = config, step_size, max_new_tokens
        self._pool = Pool(config, lambda line: self.log(line))
        functions = iter(self._pool.names)
        self.names = [entry if entry in TENANTS else next(functions) for entry in config.functions]
        """As Rollout.rewards and the metrics name them, in the order of reward.functions."""
        self.correctness = [*self._pool.names, *self.names][0]
        """The reward that decides whether an answer is correct: the first function, else the first model."""
        weights = config.weights or [1.0] * len(self.names)
        self._weights = dict(zip(self.names, weights, strict=True))

    def close(self) -> None:
        """Ends the workers and every process that they started."""
        self._pool.close()

    @property
    def pids(self) -> list[int]:
        return [pid for tenant in self.tenants for pid in tenant.pids]

    def check_columns(self, columns: Sequence[str]) -> None:
        """Raises ConfigError where a function cannot be called with these columns of the dataset."""
        problems = [
            f"data.path: column '{name}' has the name of an argument of reward functions; rename it"
            for name in columns
            if name in GIVEN
        ]
        problems += self._pool.signature_problems(_passed(columns))
        if problems:
            raise ConfigError(*problems)

    def score(self, groups: Sequence[Group], switch: Switch, strict: bool = False) -> None:
        """Fills in `rewards` and `reward`; moves rollouts without a reward to the `failed` of their group.

        The last model keeps the device. Raises RewardError, and changes no rollout, when more than
        reward.max_error_rate of them have no reward, or all have none. Rollouts that refill a step (dynamic
        sampling) may all fail unless `strict`.
        """
        pending = self.submit(groups)
        refills = len(pending.rollouts) < self._step_size and not strict
        self._fill_in(pending, self._scores(pending, switch, self.tenants), may_all_fail=refills)

    def submit(self, groups: Sequence[Group]) -> Pending:
        """Starts the functions and returns at once."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        sizes = [len(group.rollouts) for group in groups]
        calls = self._pool.submit(sizes, lambda rows: _arguments([rollouts[row] for row in rows]))
        return Pending(groups, rollouts, calls)

    def collect_correctness(self, pending: Pending, switch: Switch) -> None:
        """Like `score` for submitted groups, but asks no model except the one that decides correctness."""
        deciding = [tenant for tenant in self.tenants if tenant.reward == self.correctness]
        self._fill_in(pending, self._scores(pending, switch, deciding))

    def _scores(self, pending: Pending, switch: Switch, tenants: Sequence[RewardTenant]) -> list[Scores]:
        """Asks `tenants` and waits for the functions: the scores of each rollout."""
        by_model: list[NamedScore] = []
        for tenant in tenants:
            switch.give_to(tenant)
            by_model += [(tenant.reward, *it) for it in enumerate(tenant.score(pending.rollouts))]
        scores: list[Scores] = [{} for _ in pending.rollouts]
        by_function = chain.from_iterable(call.result() for call in pending.calls)
        for name, row, score in chain(by_function, by_model):
            scores[row][name] = score
        if len(self._pool.names) + len(tenants) == len(self.names):  # all were asked
            for of_row in scores:
                if all(score.value is None and not score.error for score in of_row.values()):
                    of_row[self.names[0]] = Score(error=NOTHING_APPLIES)
        return scores

    def _fill_in(self, pending: Pending, scores: list[Scores], may_all_fail: bool = False) -> None:
        rollouts, rate = pending.rollouts, self._config.max_error_rate
        lines = list(self._error_lines(rollouts, scores))
        failed = sum(any(score.error for score in of_row.values()) for of_row in scores)
        too_many = failed > rate * max(len(rollouts), self._step_size)
        if too_many or (failed == len(rollouts) > 0 and not may_all_fail):
            raise RewardError(
                f"{failed} of {len(rollouts)} rollouts have no reward, more than reward.max_error_rate ="
                f" {rate:g} allows: {'; '.join(lines[:CAUSES])}{'; ...' if lines[CAUSES:] else ''}"
            )
        for rollout, of_row in zip(rollouts, scores, strict=True):
            values = {name: of_row[name].value for name in self.names if name in of_row}
            rollout.rewards = {name: value for name, value in values.items() if value is not None}
            rollout.reward = self._total(rollout)
            rollout.errors = {name: score.error for name, score in of_row.items() if score.error}
            rollout.extra = dict(chain.from_iterable(score.extra.items() for score in of_row.values()))
        for group in pending.groups:
            group.failed += [rollout for rollout in group.rollouts if rollout.errors]
            group.rollouts = [rollout for rollout in group.rollouts if not rollout.errors]
        for line in lines[:NAMED]:
            self.log(f"warning: {line}; left out")
        if lines[NAMED:]:
            self.log(f"warning: {len(lines) - NAMED} more rewards failed and were left out")

    def _total(self, rollout: Rollout) -> float:
        """The weighted sum of a rollout's rewards, less what an overlong completion costs."""
        total = math.fsum(self._weights[name] * value for name, value in rollout.rewards.items())
        if buffer := self._config.overlong_buffer:
            total -= overlong_penalty(len(rollout.token_ids), self._max_new_tokens, buffer)
        return total

    def _error_lines(self, rollouts: Sequence[Rollout], scores: Sequence[dict[str, Score]]) -> Iterator[str]:
        entries = dict(zip(self.names, self._config.functions, strict=True))
        for rollout, of_row in zip(rollouts, scores, strict=True):
            text = shortened(repr(last_message(rollout.prompt.messages)), 60)
            row = f"row {rollout.prompt.index}, sample {rollout.sample} (prompt {text})"
            for name, score in of_row.items():
                if score.error:
                    yield f"reward '{entries[name]}' {score.error} for {row}"


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
        "completions": [
            it.text if isinstance(it.prompt.messages, str) else [{"role": "assistant", "content": it.text}]
            for it in rollouts
        ],
        "completion_ids": [list(rollout.token_ids) for rollout in rollouts],
        **{name: [prompt.columns[name] for prompt in prompts] for name in _passed(prompts[0].columns)},
    }
