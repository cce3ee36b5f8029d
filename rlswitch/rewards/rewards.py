"""`rewards.score(groups, switch)`: everything that scores a step's rollouts, in its order.

functions start in worker processes -> each model takes the device and scores -> the results are added up
"""

from __future__ import annotations

from collections.abc import Sequence

from rlswitch.rewards.metrics import length_metrics, reward_metrics
from rlswitch.rewards.models.tenant import RewardTenant
from rlswitch.rewards.scorer import Scorer
from rlswitch.rewards.scores import Pending
from rlswitch.switch.switch import Switch
from rlswitch.types import Group


class Rewards:
    """The reward functions of a run and its started reward tenants.

    Example: `rewards.begin_step()`, then `rewards.score(groups, switch)` for each round of rollouts.
    """

    def __init__(self, scorer: Scorer, tenants: Sequence[RewardTenant]):
        """`tenants`: in the order of reward.functions."""
        self.scorer, self.tenants = scorer, tenants
        self._step_has_rollouts = False

    @property
    def correctness(self) -> str:
        """The reward that decides whether an answer is correct: the first function, else the first tenant."""
        return self.scorer.correctness

    @property
    def pids(self) -> list[int]:
        return [pid for tenant in self.tenants for pid in tenant.pids]

    def begin_step(self) -> None:
        """The next round of rollouts is the first of its step."""
        self._step_has_rollouts = False

    def score(self, groups: Sequence[Group], switch: Switch) -> None:
        """Fills in `rewards` and `reward`; moves rollouts without a reward to the `failed` of their group.

        The last tenant keeps the device. Raises RewardError, and changes no rollout, when more than
        reward.max_error_rate of them have no reward, or all of a step's first round.
        """
        pending = self.submit(groups)
        self._ask(self.tenants, pending, switch)
        self.scorer.collect(pending, may_all_fail=self._step_has_rollouts)
        self._step_has_rollouts = True

    def submit(self, groups: Sequence[Group]) -> Pending:
        """Starts the functions and returns at once."""
        return self.scorer.submit(groups)

    def collect_correctness(self, pending: Pending, switch: Switch) -> None:
        """Like `score` for submitted groups, but asks no tenant except the one that decides correctness."""
        deciding = [tenant for tenant in self.tenants if tenant.reward == self.correctness]
        self._ask(deciding, pending, switch)
        self.scorer.collect(pending)

    def metrics(self, groups: Sequence[Group]) -> dict[str, float]:
        """Rewards, errors, and lengths in tokens of scored groups."""
        return reward_metrics(groups, self.scorer.names) | length_metrics(groups)

    def _ask(self, tenants: Sequence[RewardTenant], pending: Pending, switch: Switch) -> None:
        for tenant in tenants:
            switch.give_to(tenant)
            pending.by_tenant[tenant.reward] = tenant.score(pending.rollouts)
