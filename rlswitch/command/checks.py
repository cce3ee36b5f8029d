"""Mistakes in a composed run that need no file to be seen, a line for each.

`key = value: what is wrong; what would happen; what to set`
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from rlswitch.config.fields import field_problems
from rlswitch.config.sections import TENANTS, ServerEngineConfig
from rlswitch.engines.settings import engine_problems
from rlswitch.rewards.models.tenant import spec_of
from rlswitch.run import Run


def problems(run: Run) -> Iterator[str]:
    """Single settings first, then combinations."""
    yield from field_problems(run)
    yield from run.algorithm.shared_problems(run.rollout)
    yield from run.algorithm.problems(run.rollout)
    yield from engine_problems(run.engine)
    if isinstance(run.engine, ServerEngineConfig) and run.engine.url and run.switch.level == "auto":
        yield "switch.level = auto: a running server cannot be measured; set 2, or see docs/levels.md"
    yield from size_problems(run)
    yield from reward_problems(run)
    yield from tenant_problems(run)
    if run.model.lora_rank == 0 and run.checkpoint.merged:
        yield "checkpoint.merged = true: without LoRA checkpoints hold the whole model; set it to false"


def size_problems(run: Run) -> Iterator[str]:
    """Numbers of rollouts and tokens that do not fit together."""
    rollouts, minibatches = run.rollout.num_prompts * run.rollout.group_size, run.trainer.minibatches
    if rollouts % minibatches:
        yield (
            f"trainer.minibatches = {minibatches}: does not divide the {rollouts} rollouts of a step"
            f" (rollout.num_prompts x rollout.group_size); set a divisor of {rollouts}"
        )
    need = run.data.max_prompt_tokens + run.rollout.max_new_tokens
    what = f"data.max_prompt_tokens + rollout.max_new_tokens is {need} tokens"
    if (length := run.engine.max_model_len) is not None and need > length:
        yield f"engine.max_model_len = {length}: {what}; set at least {need}, or lower one of them"
    if (tokens := run.trainer.micro_batch_tokens) < need:
        yield f"trainer.micro_batch_tokens = {tokens}: {what}; set at least {need}, or lower one of them"


def reward_problems(run: Run) -> Iterator[str]:
    """Rewards that cannot be computed, or from which nothing can be learned."""
    functions, weights, pattern = run.reward.functions, run.reward.weights, run.reward.format_pattern
    if weights and len(weights) != len(functions):
        yield f"reward.weights = {weights}: set one for each of reward.functions, or [] for all 1"
    yield from (
        f"reward.weights = {weights}: {it} is not a finite number" for it in weights if not math.isfinite(it)
    )
    if (buffer := run.reward.overlong_buffer) > run.rollout.max_new_tokens:
        yield f"reward.overlong_buffer = {buffer}: above rollout.max_new_tokens, penalises all; set less"
    if pattern is None and "format" in functions:
        yield "reward.format_pattern = null: the reward 'format' needs one; set a regular expression"
    try:
        re.compile(pattern or "")
    except re.error as error:
        yield f"reward.format_pattern = {pattern}: not a regular expression ({error}); correct it"
    if not functions:
        yield "reward.functions = []: no reward to learn from; name at least one function"


def tenant_problems(run: Run) -> Iterator[str]:
    """A model among the rewards without a path, a path without its reward, and mistakes in its settings."""
    functions = run.reward.functions
    for name in TENANTS:
        path = getattr(run, name).path
        if name in functions and not path:
            yield f"{name}.path = null: reward.functions names '{name}'; set a directory or hub id"
        elif path and name not in functions:
            yield (
                f"{name}.path = {path}: reward.functions = {functions} does not name '{name}', it would never"
                f" be asked; set reward.functions=[{','.join([*functions, name])}], or {name}.path=null"
            )
        if functions.count(name) > 1:
            yield f"reward.functions = {functions}: '{name}' is there twice, it has one score; name it once"
        if name in functions:
            yield from spec_of(name).problems(run)
