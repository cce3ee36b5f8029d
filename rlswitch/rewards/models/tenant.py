"""Models that give rewards: tenants of the switch, each with the device to itself while it scores.

pending = scorer.submit(groups)           # functions start in processes of their own
ask_in_turn(tenants, pending, switch)     # meanwhile each tenant takes the device and scores
scorer.collect(pending)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rlswitch.rewards.scorer import Mark, Pending
from rlswitch.switch.ledger import Ledger
from rlswitch.switch.switch import Switch
from rlswitch.types import PolicyWeights, Rollout


class RewardTenant(ABC):
    """A tenant of the switch (switch.Tenant) that can score once it holds the device."""

    name: str
    """In switch.jsonl and on the console."""
    reward: str
    """In reward.functions and the metrics."""

    @abstractmethod
    def acquire(self, weights: PolicyWeights | None) -> None: ...

    @abstractmethod
    def release(self) -> None: ...

    @abstractmethod
    def unreleased(self) -> str | None: ...

    @property
    @abstractmethod
    def pids(self) -> list[int]:
        """Processes of its own."""

    @abstractmethod
    def score(self, rollouts: Sequence[Rollout]) -> list[Mark]:
        """A mark for each; rollouts that are equal in prompt and completion get equal ones."""

    @abstractmethod
    def close(self) -> None:
        """Ends whatever it has started."""


class Candidate(NamedTuple):
    """A model that has been looked at, can be refused no more, and is not started yet."""

    name: str
    start: Callable[[Ledger, Path, Path, Callable[[str], None]], RewardTenant]
    """Ledger, output_dir, scratch (removed should this process be killed) and say -> it holds the device."""


def ask_in_turn(tenants: Sequence[RewardTenant], pending: Pending, switch: Switch) -> None:
    """Hands the device to each of them and adds its marks to `pending`; the last one keeps it."""
    for tenant in tenants:
        switch.give_to(tenant)
        pending.marks[tenant.reward] = tenant.score(pending.rollouts)
