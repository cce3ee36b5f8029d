"""From prompts to requests, and from completions to rollouts. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from rlswitch.engines.backend import Completion, Request
from rlswitch.errors import EngineError
from rlswitch.seeds import request_seed
from rlswitch.types import Group, Prompt, Rollout, Sampling


def requests_for(prompts: Sequence[Prompt], sampling: Sampling) -> list[Request]:
    """`sampling.num_samples` requests per prompt, each with its own seed."""
    num_samples = sampling.num_samples
    return [
        Request(
            token_ids=prompt.token_ids,
            seed=request_seed(sampling.seed, sampling.step, prompt.index, sample),
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
        )
        for prompt in prompts
        # In its next epoch a prompt continues the numbering, so it gets new samples.
        for sample in range(prompt.epoch * num_samples, (prompt.epoch + 1) * num_samples)
    ]


def groups_from(
    engine: str,
    version: int,
    prompts: Sequence[Prompt],
    completions: Mapping[int, Completion],
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Group]:
    """The completions of `requests_for`, by request index, as groups of rollouts of policy `version`.

    `engine` is the name for errors. Raises EngineError for a completion that is missing or unusable.
    """
    size = sampling.num_samples
    if len(completions) != len(prompts) * size:
        raise EngineError(f"{engine}: {len(completions)} completions for {len(prompts) * size} requests")
    ordered = [completions[index] for index in range(len(completions))]
    texts = tokenizer.batch_decode([it.token_ids for it in ordered], skip_special_tokens=True)
    rollouts = [
        Rollout(
            prompt=prompts[index // size],
            sample=index % size,
            token_ids=completion.token_ids,
            logprobs=completion.logprobs,
            text=text,
            finish_reason=completion.finish_reason,
            policy_version=version,
        )
        for index, (completion, text) in enumerate(zip(ordered, texts, strict=True))
    ]
    for rollout in rollouts:
        _check_rollout(engine, rollout)
    return [
        Group(prompt=prompt, rollouts=rollouts[index * size : (index + 1) * size])
        for index, prompt in enumerate(prompts)
    ]


def _check_rollout(engine: str, rollout: Rollout) -> None:
    tokens, logprobs = len(rollout.token_ids), len(rollout.logprobs)
    where = f"{engine}: prompt {rollout.prompt.index} sample {rollout.sample}"
    if not tokens or tokens != logprobs:
        raise EngineError(f"{where} came back with {tokens} tokens and {logprobs} log-probabilities")
    if rollout.finish_reason not in ("stop", "length"):
        raise EngineError(
            f"{where} ended with '{rollout.finish_reason}' after {tokens} tokens: another client controls"
            " this engine too; start one for this run alone"
        )
