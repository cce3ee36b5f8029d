"""Accuracy on the held-out prompts, measured while the engine is awake anyway."""

from __future__ import annotations

from collections.abc import Sequence

from rlswitch.config import EvaluationConfig, Run
from rlswitch.engines.base import Engine
from rlswitch.ledger import Ledger
from rlswitch.rewards.scorer import Pending, Scorer
from rlswitch.types import Prompt, Sampling

CORRECT = 1.0
"""A completion is correct when the first reward function gives it at least this much."""


def is_due(config: EvaluationConfig, step: int, num_steps: int) -> bool:
    """Before training, every `config.every` steps, and at the end."""
    return config.every > 0 and (step % config.every == 0 or step == num_steps)


def evaluate(
    engine: Engine, held_out: Sequence[Prompt], scorer: Scorer, run: Run, ledger: Ledger
) -> dict[str, float]:
    """`val/<dataset>/acc`, greedy, and `val/<dataset>/pass@k` over sampled completions."""
    assert engine.version is not None
    name = dataset_name(run.data.eval_path or run.data.path)
    greedy = Sampling(
        num_samples=1,
        max_new_tokens=run.rollout.max_new_tokens,
        temperature=0.0,
        seed=run.seed,
        step=engine.version,
    )
    sampled = Sampling(
        num_samples=run.evaluation.num_samples,
        max_new_tokens=run.rollout.max_new_tokens,
        temperature=run.rollout.temperature,
        seed=run.seed,
        step=engine.version,
    )
    with ledger.work("evaluation"):
        pending = [(f"val/{name}/acc", scorer.submit(engine.generate(held_out, greedy)))]
        if run.evaluation.num_samples > 1:  # while the first are being scored
            key = f"val/{name}/pass@{run.evaluation.num_samples}"
            pending.append((key, scorer.submit(engine.generate(held_out, sampled))))
        engine.forget_prefixes()  # a resumed run has not just evaluated
        return {key: _share_solved(scores, scorer) for key, scores in pending}


def dataset_name(path: str) -> str:
    """Short name of a dataset for metric names.

    Example: dataset_name("openai/gsm8k") == "gsm8k"; dataset_name("builtin:addition") == "addition"
    """
    return path.rstrip("/").split("/")[-1].split(":")[-1].rsplit(".", 1)[0]


def _share_solved(pending: Pending, scorer: Scorer) -> float:
    """Of the groups of which at least one rollout has a reward."""
    scorer.collect(pending)
    first = scorer.names[0]
    solved = [
        any((rollout.rewards.get(first) or 0.0) >= CORRECT for rollout in group.rollouts)
        for group in pending.groups
        if group.rollouts
    ]
    return sum(solved) / len(solved)
