"""Changes to the total reward that depend on the completion, not on its answer."""

from __future__ import annotations

from collections.abc import Sequence

from rlswitch.types import Group


def punish_overlong(groups: Sequence[Group], max_length: int, buffer: int) -> None:
    """Takes up to 1 from the reward of completions that use the last `buffer` tokens; in place.

    Source: DAPO's soft overlong punishment (arXiv:2503.14476, equation 13).
    """
    for group in groups:
        for rollout in group.rollouts:
            over = len(rollout.token_ids) - (max_length - buffer)
            rollout.reward -= min(max(over / buffer, 0.0), 1.0)
