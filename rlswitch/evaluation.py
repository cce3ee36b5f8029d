"""Accuracy on the held-out prompts, measured while the engine is awake anyway.

The first reward function decides what is correct. Without one the first model among the rewards does, and
the device changes hands for it.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from rlswitch.config.sections import EvaluationConfig
from rlswitch.session import Session
from rlswitch.types import Group

CORRECT = 1.0
"""The least score of a correct completion."""


def is_due(config: EvaluationConfig, step: int, num_steps: int) -> bool:
    """Before training, every `config.every` steps, and at the end."""
    return config.every > 0 and (step % config.every == 0 or step == num_steps)


def evaluate(session: Session) -> dict[str, float]:
    """`val/<dataset>/acc`, greedy, and `val/<dataset>/pass@k` over sampled completions."""
    run, engine, rewards = session.run, session.engine, session.rewards
    sample = session.sampler.sample
    assert engine.version is not None
    name = dataset_name(run.data.eval_path or run.data.path)
    sampled = run.sampling(run.evaluation.num_samples, step=engine.version)
    greedy = replace(sampled, num_samples=1, temperature=0.0)
    with session.ledger.work("evaluation"):
        pending = {f"val/{name}/acc": rewards.submit(sample(engine, session.held_out, greedy))}
        if run.evaluation.num_samples > 1:  # while the greedy ones are scored
            key = f"val/{name}/pass@{run.evaluation.num_samples}"
            pending[key] = rewards.submit(sample(engine, session.held_out, sampled))
        engine.forget_prefixes()  # a resumed run has not just evaluated
        for scores in pending.values():
            rewards.collect_correctness(scores, session.switch)
        return {key: _share_solved(it.groups, rewards.correctness) for key, it in pending.items()}


def dataset_name(path: str) -> str:
    """Short name of a dataset for metric names.

    Example: dataset_name("openai/gsm8k") == "gsm8k"; dataset_name("builtin:addition") == "addition"
    """
    return path.rstrip("/").split("/")[-1].split(":")[-1].rsplit(".", 1)[0]


def _share_solved(groups: Sequence[Group], correctness: str) -> float:
    """The share of groups with a correct rollout, among those with a scored one; nan if there are none."""
    scored = [
        [it.rewards[correctness] for it in group.rollouts if correctness in it.rewards] for group in groups
    ]
    solved = [max(scores) >= CORRECT for scores in scored if scores]
    return sum(solved) / len(solved) if solved else math.nan
