"""Mistakes in a composed run that need no file to be seen, a line for each.

`key = value: what is wrong; what would happen; what to set`
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from rlswitch.config.fields import field_problems
from rlswitch.config.sections import TENANTS, ServerEngineConfig
from rlswitch.engines.vllm.address import UNPROTECTED, parse_listen, parse_url
from rlswitch.rewards.models.template import pattern_problems, template_problems
from rlswitch.run import Run

OWNED_BY_SETTINGS = {
    "model": "model.path",
    "dtype": "model.dtype",
    "trust_remote_code": "model.trust_remote_code",
    "seed": "seed",
    "max_model_len": "engine.max_model_len",
    "gpu_memory_utilization": "engine.gpu_memory_utilization",
    "kv_cache_memory_bytes": "engine.kv_cache_gib",
    "tensor_parallel_size": "engine.tensor_parallel_size",
    "enforce_eager": "engine.enforce_eager",
}
"""Arguments of vLLM that have a setting of their own."""

NEEDED_BY_PROOF = (
    "worker_cls",
    "logprobs_mode",
    "enable_prefix_caching",
    "enable_sleep_mode",
    "skip_tokenizer_init",
    "max_logprobs",
)
"""Arguments of vLLM without which a push could not be proven."""


def problems(run: Run) -> Iterator[str]:
    """Single settings first, then combinations."""
    yield from field_problems(run)
    yield from run.algorithm.shared_problems(run.rollout)
    yield from run.algorithm.problems(run.rollout)
    yield from vllm_problems(run)
    if isinstance(run.engine, ServerEngineConfig):
        yield from address_problems(run.engine)
        if run.engine.url and run.switch.level == "auto":
            yield (
                "switch.level = auto: what a running server can do and needs is not measured here; set 2, or"
                " what docs/levels.md says"
            )
    yield from size_problems(run)
    yield from reward_problems(run)
    yield from tenant_problems(run)
    if run.model.lora_rank == 0 and run.checkpoint.merged:
        yield "checkpoint.merged = true: without LoRA checkpoints hold the whole model; set it to false"


def vllm_problems(run: Run) -> Iterator[str]:
    """Arguments of vLLM that are not the user's to give."""
    for key in run.engine.vllm:
        if key in OWNED_BY_SETTINGS:
            yield f"engine.vllm.{key}: has a setting of its own; set {OWNED_BY_SETTINGS[key]}"
        elif key == "enable_lora":
            yield (
                "engine.vllm.enable_lora: a push carries the merged weights, so the engine needs no adapters,"
                " and with them sleep level 2 loses their base; leave it out, set model.lora_rank"
            )
        elif key in NEEDED_BY_PROOF:
            yield f"engine.vllm.{key}: is fixed, a push could not be proven otherwise; leave it out"


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
    if (buffer := run.reward.overlong_buffer) > run.rollout.max_new_tokens:
        yield (
            f"reward.overlong_buffer = {buffer}: longer than rollout.max_new_tokens"
            f" {run.rollout.max_new_tokens}, so every completion would be penalised; set less"
        )
    if pattern is None and "format" in functions:
        yield "reward.format_pattern = null: the reward 'format' needs one; set a regular expression"
    try:
        re.compile(pattern or "")
    except re.error as error:
        yield f"reward.format_pattern = {pattern}: not a regular expression ({error}); correct it"
    if not functions:
        yield "reward.functions = []: no reward to learn from; name at least one function"


def tenant_problems(run: Run) -> Iterator[str]:
    """A judge or reward model that is asked and not there, or the other way round; how it is asked."""
    functions = run.reward.functions
    for name in TENANTS:
        path = getattr(run, name).path
        if name in functions and not path:
            yield (
                f"{name}.path = null: reward.functions names '{name}', there would be nothing to ask; set"
                f" {name}.path=<a Hugging Face directory or hub id>"
            )
        elif path and name not in functions:
            yield (
                f"{name}.path = {path}: reward.functions = {functions} does not name '{name}', it would never"
                f" be asked; set reward.functions=[{','.join([*functions, name])}], or {name}.path=null"
            )
        if functions.count(name) > 1:
            yield f"reward.functions = {functions}: '{name}' is there twice, it has one score; name it once"
    if "judge" in functions:
        yield from template_problems(run.judge.prompt)
        yield from pattern_problems(run.judge.pattern)


def address_problems(engine: ServerEngineConfig) -> Iterator[str]:
    """Addresses that cannot be read, and those that others could reach."""
    for key in ("host", "port", "uds"):
        if key in engine.vllm:
            yield f"engine.vllm.{key}: has a setting of its own; set engine.listen"
    try:
        key, text = ("url", engine.url) if engine.url is not None else ("listen", engine.listen)
        address = parse_url(text) if key == "url" else parse_listen(text)
    except ValueError as error:
        yield f"engine.{key} = {text}: {error}"
        return
    if address is not None and not address.is_local and not engine.allow_remote:
        yield (
            f"engine.{key} = {text}: is not on this machine's loopback; {UNPROTECTED}; use 127.0.0.1 or a"
            " Unix socket, or set engine.allow_remote=true on a network that you trust"
        )
