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
        yield (
            "switch.level = auto: what a running server can do and needs is not measured here; set 2, or"
            " what docs/levels.md says"
        )
    yield from size_problems(run)
    yield from reward_problems(run)
    yield from tenant_problems(run)
    if run.model.lora_rank == 0 and run.checkpoint.merged:
        yield (
            "checkpoint.merged = true: without LoRA every checkpoint holds the whole model anyway; set"
            " model.lora_rank above 0, or checkpoint.merged=false"
        )


def size_problems(run: Run) -> Iterator[str]:
    """Numbers of rollouts and tokens that do not fit together."""
    rollouts = run.rollout.num_prompts * run.rollout.group_size
    if rollouts % run.trainer.minibatches:
        yield (
            f"trainer.minibatches = {run.trainer.minibatches}: does not divide the {rollouts} rollouts of a"
            f" step (rollout.num_prompts x rollout.group_size); set a divisor of {rollouts}"
        )
    need = run.data.max_prompt_tokens + run.rollout.max_new_tokens
    if run.engine.max_model_len is not None and need > run.engine.max_model_len:
        yield (
            f"engine.max_model_len = {run.engine.max_model_len}: data.max_prompt_tokens"
            f" {run.data.max_prompt_tokens} + rollout.max_new_tokens {run.rollout.max_new_tokens} = {need}"
            f" tokens do not fit; set engine.max_model_len={need}, or lower one of them"
        )
    if run.trainer.micro_batch_tokens < need:
        yield (
            f"trainer.micro_batch_tokens = {run.trainer.micro_batch_tokens}: a rollout can have {need} tokens"
            f" and would not fit; set at least {need}"
        )


def reward_problems(run: Run) -> Iterator[str]:
    """Rewards that cannot be computed, or from which nothing can be learned."""
    if run.reward.weights and len(run.reward.weights) != len(run.reward.functions):
        yield (
            f"reward.weights = {run.reward.weights}: {len(run.reward.weights)} weights for"
            f" {len(run.reward.functions)} functions; give one for each, or [] for all 1"
        )
    for weight in run.reward.weights:
        if not math.isfinite(weight):
            yield f"reward.weights = {run.reward.weights}: {weight} is not a finite number"
    if run.reward.overlong_buffer > run.rollout.max_new_tokens:
        yield (
            f"reward.overlong_buffer = {run.reward.overlong_buffer}: longer than rollout.max_new_tokens"
            f" {run.rollout.max_new_tokens}, so every completion would be penalised; set less"
        )
    if run.reward.format_pattern is None and "format" in run.reward.functions:
        yield (
            "reward.format_pattern = null: the reward 'format' needs one; set a regular expression that a"
            " whole completion has to match"
        )
    if run.reward.format_pattern is not None:
        try:
            re.compile(run.reward.format_pattern)
        except re.error as error:
            yield (
                f"reward.format_pattern = {run.reward.format_pattern}: not a regular expression ({error});"
                " set one that a whole completion has to match"
            )
    if not run.reward.functions:
        yield "reward.functions = []: no reward to learn from; name at least one function"


def tenant_problems(run: Run) -> Iterator[str]:
    """A model among the rewards without a path, a path without its reward, and mistakes in its settings."""
    functions = run.reward.functions
    for name in TENANTS:
        path = getattr(run, name).path
        if name in functions and not path:
            yield (
                f"{name}.path = null: reward.functions names '{name}', but no model is configured; set"
                f" {name}.path=<a Hugging Face directory or hub id>"
            )
        elif path and name not in functions:
            yield (
                f"{name}.path = {path}: reward.functions = {functions} does not name '{name}', it would never"
                f" be asked; set reward.functions=[{','.join([*functions, name])}], or {name}.path=null"
            )
        if functions.count(name) > 1:
            yield f"reward.functions = {functions}: '{name}' is there twice, it has one score; name it once"
        if name in functions:
            yield from spec_of(name).problems(run)
