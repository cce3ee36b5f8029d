"""The nouns: what travels between the rollout engine, the rewards and the trainer, and the errors.

Shapes: B rollouts, T completion tokens (padded), P prompts, G rollouts of one prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds to import; a typing mistake must be answered sooner
    import torch
    from torch import Tensor


@dataclass(kw_only=True, slots=True)
class Prompt:
    """One row of the dataset, tokenised once."""

    index: int
    """Row number in its dataset: names the prompt in logs and seeds its samples."""
    epoch: int = 0
    """Which pass over the dataset it is taken in: a step can have the same prompt from two."""
    messages: str | list[dict[str, str]]
    """What the reward functions see: the text, or the chat messages."""
    token_ids: list[int]
    columns: dict[str, Any] = field(default_factory=dict)
    """The dataset's other columns (an answer, a test case), passed to the reward functions."""


@dataclass(kw_only=True, slots=True)
class Rollout:
    """One completion of one prompt, sampled by the engine at one policy version.

    Example: Rollout(prompt=p, sample=3, token_ids=[7, 9, 1], logprobs=[-0.1, -0.2, -0.0],
        text="79", finish_reason="stop", policy_version=12)
    """

    prompt: Prompt
    sample: int
    """Which of the group's samples this is: 0 .. group_size - 1."""
    token_ids: list[int]
    logprobs: list[float]
    """Log-probability of each sampled token as the engine saw it, after temperature."""
    text: str
    finish_reason: str
    """`stop` (end of sequence) or `length` (cut at rollout.max_new_tokens)."""
    policy_version: int
    rewards: dict[str, float] = field(default_factory=dict)
    """Raw score by reward function name."""
    reward: float = 0.0
    """The weighted sum of `rewards`, less what shaping took: what the algorithm learns from."""
    errors: dict[str, str] = field(default_factory=dict)
    """Why it has no reward, by reward function name; such a rollout is left out of training."""
    extra: dict[str, str] = field(default_factory=dict)
    """What reward functions had to say about it (TRL's log_extra), by column."""


@dataclass(kw_only=True, slots=True)
class Group:
    """All rollouts of one prompt in one step."""

    prompt: Prompt
    rollouts: list[Rollout]
    failed: list[Rollout] = field(default_factory=list)
    """Those that no reward could be had for: recorded, never trained on."""

    @property
    def is_informative(self) -> bool:
        """Whether its rewards differ: a group that is all right or all wrong has nothing to compare."""
        return len({rollout.reward for rollout in self.rollouts}) > 1


@dataclass(kw_only=True, slots=True)
class Sampling:
    """How to sample: a seed per request is derived from (seed, step, prompt, sample)."""

    num_samples: int
    max_new_tokens: int
    temperature: float
    seed: int
    step: int


@dataclass(kw_only=True, slots=True)
class Canary:
    """Fixed token sequences and the log-probabilities the trainer gives them: the engine must agree."""

    sequences: list[list[int]]
    logprobs: list[list[float]]
    """logprobs[i][t] is log p(sequences[i][t + 1] | sequences[i][: t + 1]), at temperature 1."""


@dataclass(kw_only=True, slots=True)
class PolicyWeights:
    """One published version of the policy: where it lies, and what proves that it arrived.

    A frozen engine's own checkpoint is version 0 (rlswitch/engines/start.py).
    """

    version: int
    """Number of finished training steps behind these weights."""
    path: Path
    nbytes: int
    fingerprint: int
    """Additive hash of every element as published, in the engine's dtype (see fingerprint.py)."""
    tensors: dict[str, int]
    """Fingerprint by checkpoint name: names the culprit when a proof fails."""
    canary: Canary
    initial_fingerprints: list[int | None] | None = None
    """What each worker of a frozen engine held at its start; None: `fingerprint`, as published."""


LATER: Any = None
"""A tensor that a later phase fills in, if the algorithm asks for it; reading it before is a bug."""


@dataclass(kw_only=True, slots=True)
class Batch:
    """One step's rollouts as tensors, padded on the right. Everything per token has shape [B, T]."""

    token_ids: Tensor  # [B, S] prompt and completion
    attention_mask: Tensor  # [B, S]
    prompt_lengths: Tensor  # [B]
    mask: Tensor  # [B, T] True where a completion token is
    rollout_logprobs: Tensor  # [B, T] the engine's
    rewards: Tensor  # [B]
    group: Tensor  # [B] index of the prompt's group
    truncated: Tensor  # [B] True where generation stopped at rollout.max_new_tokens
    old_logprobs: Tensor = LATER  # [B, T] the trainer's, before the update
    reference_logprobs: Tensor = LATER  # [B, T]
    values: Tensor = LATER  # [B, T] the critic's, before the update
    advantages: Tensor = LATER  # [B, T]
    returns: Tensor = LATER  # [B, T] what the critic learns
    weights: Tensor = LATER  # [B, T] of each token in the loss; sums to one over a minibatch

    def __len__(self) -> int:
        return self.token_ids.shape[0]

    def not_finite(self) -> list[str]:
        """Names of the tensors that hold a NaN or an infinity; nothing can be learned from them."""
        return [name for name, value in self._tensors() if not value.isfinite().all()]

    def to(self, device: torch.device) -> Batch:
        return Batch(**{name: value.to(device) for name, value in self._tensors()})

    def rows(self, index: Tensor) -> Batch:
        """The rollouts in `index` [N], trimmed to their longest sequence and completion."""
        chosen = {name: value[index] for name, value in self._tensors()}
        width = int(chosen["attention_mask"].sum(-1).max())
        depth = max(int(chosen["mask"].sum(-1).max()), 1)
        sequence = ("token_ids", "attention_mask")
        return Batch(
            **{
                name: value[:, : width if name in sequence else depth] if value.dim() == 2 else value
                for name, value in chosen.items()
            }
        )

    def _tensors(self) -> list[tuple[str, Tensor]]:
        named = [(item.name, getattr(self, item.name)) for item in fields(self)]
        return [(name, value) for name, value in named if value is not None]
