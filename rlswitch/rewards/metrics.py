"""What a step's metrics say about its rewards and lengths."""

from collections import Counter
from collections.abc import Sequence
from statistics import fmean, pstdev

from rlswitch.types import Group


def reward_metrics(groups: Sequence[Group], names: Sequence[str]) -> dict[str, float]:
    """Mean, spread and error rate of the total reward and of each in `names`; lengths in tokens.

    The lengths are of completions, with the share that was cut off, and of prompts.
    """
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
    for name in names:
        values = [rollout.rewards[name] for rollout in rollouts if name in rollout.rewards]
        if values:
            result |= {f"reward/{name}/mean": fmean(values), f"reward/{name}/std": pstdev(values)}
        result[f"reward/{name}/error_rate"] = errors[name] / (len(rollouts) + len(failed))
    responses = [len(rollout.token_ids) for rollout in rollouts]
    prompts = [len(group.prompt.token_ids) for group in groups]
    return result | {
        "response_length/mean": fmean(responses),
        "response_length/max": float(max(responses)),
        "response_length/min": float(min(responses)),
        "response_length/clip_ratio": fmean(r.finish_reason == "length" for r in rollouts),
        "prompt_length/mean": fmean(prompts),
        "prompt_length/max": float(max(prompts)),
    }
