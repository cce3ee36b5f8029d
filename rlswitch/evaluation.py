"""Accuracy on the held-out prompts, measured while the engine is awake anyway.

The first reward function says what is right. Only where there is none is a judge or a reward model asked:
then the device changes hands here too.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from rlswitch.config.sections import EvaluationConfig
from rlswitch.rewards.models.tenant import ask_in_turn
from rlswitch.rewards.scorer import Pending, Scorer

if TYPE_CHECKING:
    from rlswitch.session import Session

CORRECT = 1.0
"""A completion is correct when it gets at least this much."""


def is_due(config: EvaluationConfig, step: int, num_steps: int) -> bool:
    """Before training, every `config.every` steps, and at the end."""
    return config.every > 0 and (step % config.every == 0 or step == num_steps)


def evaluate(session: Session) -> dict[str, float]:
    """`val/<dataset>/acc`, greedy, and `val/<dataset>/pass@k` over sampled completions."""
    run, engine, scorer = session.run, session.engine, session.scorer
    assert engine.version is not None
    name = dataset_name(run.data.eval_path or run.data.path)
    sampled = run.sampling(run.evaluation.num_samples, step=engine.version)
    greedy = replace(sampled, num_samples=1, temperature=0.0)
    with session.ledger.work("evaluation"):
        pending = {f"val/{name}/acc": scorer.submit(engine.generate(session.held_out, greedy))}
        if run.evaluation.num_samples > 1:  # while the first are being scored
            key = f"val/{name}/pass@{run.evaluation.num_samples}"
            pending[key] = scorer.submit(engine.generate(session.held_out, sampled))
        engine.forget_prefixes()  # a resumed run has not just evaluated
        judges = [tenant for tenant in session.tenants if tenant.reward == scorer.judged_by]
        for scores in pending.values():
            ask_in_turn(judges, scores, session.switch)
        return {key: _share_solved(scores, scorer) for key, scores in pending.items()}


def dataset_name(path: str) -> str:
    """Short name of a dataset for metric names.

    Example: dataset_name("openai/gsm8k") == "gsm8k"; dataset_name("builtin:addition") == "addition"
    """
    return path.rstrip("/").split("/")[-1].split(":")[-1].rsplit(".", 1)[0]


def _share_solved(pending: Pending, scorer: Scorer) -> float:
    """Of the groups of which at least one rollout was judged; nan when none was."""
    scorer.collect(pending)
    judge = scorer.judged_by
    solved = [
        any(rollout.rewards.get(judge, 0.0) >= CORRECT for rollout in group.rollouts)
        for group in pending.groups
        if any(judge in rollout.rewards for rollout in group.rollouts)
    ]
    return sum(solved) / len(solved) if solved else math.nan
