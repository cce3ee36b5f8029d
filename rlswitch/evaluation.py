"""Accuracy on the held-out prompts, measured while the engine is awake anyway."""

from __future__ import annotations

from collections.abc import Sequence

from rlswitch.config import EvaluationConfig, Run
from rlswitch.engines.base import Engine
from rlswitch.ledger import Ledger
from rlswitch.rewards.scorer import Scorer
from rlswitch.types import Group, Prompt, Sampling

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
        metrics = {f"val/{name}/acc": _share_solved(engine.generate(held_out, greedy), scorer)}
        if run.evaluation.num_samples > 1:
            solved = _share_solved(engine.generate(held_out, sampled), scorer)
            metrics[f"val/{name}/pass@{run.evaluation.num_samples}"] = solved
        engine.forget_prefixes()  # a resumed run has not just evaluated
    return metrics


def dataset_name(path: str) -> str:
    """Short name of a dataset for metric names.

    Example: dataset_name("openai/gsm8k") == "gsm8k"; dataset_name("builtin:addition") == "addition"
    """
    return path.rstrip("/").split("/")[-1].split(":")[-1].rsplit(".", 1)[0]


def _share_solved(groups: Sequence[Group], scorer: Scorer) -> float:
    scorer.score(groups)
    first = scorer.names[0]
    solved = [
        any((rollout.rewards.get(first) or 0.0) >= CORRECT for rollout in group.rollouts) for group in groups
    ]
    return sum(solved) / len(solved)
