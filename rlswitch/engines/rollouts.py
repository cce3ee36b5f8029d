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
    num_samples: int,
    completions: Mapping[int, Completion],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Group]:
    """The completions of `requests_for`, by request index, as groups of rollouts.

    `engine` is its name and `version` the policy it serves. Raises EngineError for what is no rollout.
    """
    if len(completions) != len(prompts) * num_samples:
        raise EngineError(
            f"{engine}: {len(completions)} completions for {len(prompts) * num_samples} requests"
        )
    ordered = [completions[index] for index in range(len(completions))]
    texts = tokenizer.batch_decode([it.token_ids for it in ordered], skip_special_tokens=True)
    rows = iter(zip(ordered, texts, strict=True))
    groups = []
    for prompt in prompts:
        rollouts = []
        for sample in range(num_samples):
            completion, text = next(rows)
            _check_completion(f"{engine}: prompt {prompt.index} sample {sample}", completion)
            rollouts.append(
                Rollout(
                    prompt=prompt,
                    sample=sample,
                    token_ids=completion.token_ids,
                    logprobs=completion.logprobs,
                    text=text,
                    finish_reason=completion.finish_reason,
                    policy_version=version,
                )
            )
        groups.append(Group(prompt=prompt, rollouts=rollouts))
    return groups


def _check_completion(where: str, completion: Completion) -> None:
    tokens, logprobs = len(completion.token_ids), len(completion.logprobs)
    if not tokens or tokens != logprobs:
        raise EngineError(
            f"{where} came back with {tokens} tokens and {logprobs} log-probabilities: not a rollout"
        )
    if completion.finish_reason not in ("stop", "length"):
        raise EngineError(
            f"{where} ended with '{completion.finish_reason}' after {tokens} tokens: another client controls"
            " this engine too; start one for this run alone"
        )
