"""Scores of rollouts on their way from functions and models into the rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from rlswitch.types import Group, Rollout


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One reward of one rollout. Neither a value nor an error: the reward does not apply to it."""

    value: float | None = None
    error: str = ""
    """Why there is no value."""
    extra: Mapping[str, str] = field(default_factory=dict)
    """Columns for rollouts.jsonl."""


class Scores:
    """The scores of `size` rollouts, by row and name of the reward."""

    def __init__(self, size: int):
        self.values: list[dict[str, float]] = [{} for _ in range(size)]
        self.errors: list[dict[str, str]] = [{} for _ in range(size)]
        self.extra: list[dict[str, str]] = [{} for _ in range(size)]
        self.stopped_early = False
        """After too many errors: not every row was scored."""

    def add(self, name: str, row: int, score: Score) -> None:
        if score.error:
            self.errors[row][name] = score.error
        elif score.value is not None:
            self.values[row][name] = score.value
        self.extra[row] |= score.extra

    def count_errors(self) -> int:
        return sum(map(bool, self.errors))


@dataclass(frozen=True, kw_only=True, slots=True)
class Pending:
    """Groups that functions are scoring, and what the models among the rewards said about them so far."""

    groups: Sequence[Group]
    rollouts: list[Rollout]
    scores: Future[Scores]
    by_tenant: dict[str, list[Score]] = field(default_factory=dict)
