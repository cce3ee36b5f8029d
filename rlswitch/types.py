"""The nouns: what travels between the rollout engine, the rewards and the trainer.

Shapes: B rollouts, S tokens of prompt and completion, T of the completion alone, both padded on the right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds to import; the command line rejects a typo without it
    import torch
    from torch import Tensor


@dataclass(kw_only=True, slots=True)
class Prompt:
    """One row of the dataset, tokenised once."""

    index: int
    """Row number in the dataset: names the prompt in logs and seeds its samples."""
    epoch: int = 0
    """Pass over the dataset: one step can hold the same prompt from two passes."""
    messages: str | list[dict[str, str]]
    token_ids: list[int]
    columns: dict[str, Any] = field(default_factory=dict)
    """The dataset's other columns (an answer, a test case), passed to the reward functions."""


@dataclass(kw_only=True, slots=True)
class Rollout:
    """One completion of one prompt, sampled by the engine at one policy version."""

    prompt: Prompt
    sample: int
    """Index in the group: 0 .. group_size - 1."""
    token_ids: list[int]
    """All tokens after the prompt; lengths (`response_length/*`, rollout.max_new_tokens) count them all."""
    logprobs: list[float]
    """The engine's log-probability of each token, at the sampling temperature; ignored where not learned."""
    learned: list[bool] | None = None
    """False at tokens of an environment or a tool: context, never trained on. None: all were sampled."""
    text: str
    finish_reason: str
    """`stop` (end of sequence) or `length` (cut at rollout.max_new_tokens)."""
    policy_version: int
    rewards: dict[str, float] = field(default_factory=dict)
    """Raw score by reward function name."""
    reward: float = 0.0
    """The weighted sum of `rewards` after shaping: the algorithm learns from this."""
    errors: dict[str, str] = field(default_factory=dict)
    """Error by reward function name; a rollout with one is left out of training."""
    extra: dict[str, str] = field(default_factory=dict)
    """Columns that reward functions added to its record (TRL's log_extra)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One reward of one rollout. Neither a value nor an error: the reward does not apply to it."""

    value: float | None = None
    error: str = ""
    """Why there is no value."""
    extra: Mapping[str, str] = field(default_factory=dict)
    """Columns for rollouts.jsonl."""


@dataclass(kw_only=True, slots=True)
class Group:
    """All rollouts of one prompt in one step."""

    prompt: Prompt
    rollouts: list[Rollout]
    failed: list[Rollout] = field(default_factory=list)
    """Rollouts whose reward failed: recorded, never trained on."""

    @property
    def is_informative(self) -> bool:
        """Whether its rewards differ: equal rewards leave nothing to compare."""
        return len({rollout.reward for rollout in self.rollouts}) > 1


@dataclass(kw_only=True, slots=True)
class Sampling:
    """Sampling parameters; each request gets a seed derived from (seed, step, prompt, sample)."""

    num_samples: int
    max_new_tokens: int
    temperature: float
    seed: int
    step: int


@dataclass(kw_only=True, slots=True)
class Canary:
    """Fixed token sequences and the trainer's log-probabilities of them, which the engine must reproduce."""

    sequences: list[list[int]]
    logprobs: list[list[float]]
    """logprobs[i][t] is log p(sequences[i][t + 1] | sequences[i][: t + 1]), at temperature 1."""


@dataclass(kw_only=True, slots=True)
class PolicyWeights:
    """One published version of the policy: its checkpoint and the proof of its arrival.

    A frozen engine's own checkpoint is version 0 (rlswitch/engines/start.py).
    """

    version: int
    """Number of training steps behind these weights."""
    path: Path
    nbytes: int
    fingerprint: int
    """Additive hash of every element as published, in the engine's dtype (proof/fingerprint.py)."""
    tensors: dict[str, int]
    """Fingerprint by checkpoint name: a failed proof names the wrong tensor."""
    canary: Canary
    initial_fingerprints: list[int | None] | None = None
    """What each worker of a frozen engine held at its start; None: `fingerprint`, as published."""


LATER: Any = None
"""A tensor that a later phase adds if the algorithm needs it; reading it earlier is a bug."""


@dataclass(kw_only=True, slots=True)
class Batch:
    """One step's rollouts as tensors, padded on the right.

    Floating tensors [B, T] are zero off `loss_mask`, and every statistic, loss and metric of tokens is
    taken over `loss_mask`. `completion_mask` only says how far a completion reaches.
    """

    token_ids: Tensor  # [B, S] prompt and completion
    attention_mask: Tensor  # [B, S]
    prompt_lengths: Tensor  # [B]
    completion_mask: Tensor  # [B, T] True where a token follows the prompt: contiguous from column 0
    loss_mask: Tensor  # [B, T] True where the policy sampled that token: it is learned from
    rollout_logprobs: Tensor  # [B, T] the engine's
    rewards: Tensor  # [B]
    group: Tensor  # [B] index of the prompt's group
    truncated: Tensor  # [B] True where generation stopped at rollout.max_new_tokens
    old_logprobs: Tensor = LATER  # [B, T] the trainer's before the update; see Trainer.updates_once
    reference_logprobs: Tensor = LATER  # [B, T]
    values: Tensor = LATER  # [B, T] the critic's, before the update
    advantages: Tensor = LATER  # [B, T]
    returns: Tensor | None = None  # [B, T] the critic's targets
    weights: Tensor = LATER  # [B, T] of each token in the loss of a minibatch

    def __len__(self) -> int:
        return self.token_ids.shape[0]

    def not_finite(self) -> list[str]:
        """Names of the tensors that hold a NaN or an infinity."""
        return [name for name, value in self._tensors() if not value.isfinite().all()]

    def learned(self, values: Tensor) -> Tensor:
        """`values` [B, T] with zero off the loss mask; no gradient passes there."""
        return values.masked_fill(~self.loss_mask, 0.0)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each prompt and completion; [B]."""
        return self.attention_mask.sum(-1)

    @property
    def sampled_tokens(self) -> int:
        """How many tokens the policy sampled: the environment's and padding excluded."""
        return int(self.loss_mask.sum())

    def mean_advantages(self) -> Tensor:
        """Mean advantage of each rollout's learned tokens; [B]."""
        return self.learned(self.advantages).sum(-1) / self.loss_mask.sum(-1).clamp(min=1)

    def to(self, device: torch.device) -> Batch:
        return Batch(**{name: value.to(device) for name, value in self._tensors()})

    def rows(self, index: Tensor) -> Batch:
        """The rollouts in `index` [N], trimmed to their longest sequence and completion."""
        width, depth = int(self.lengths[index].max()), int(self.completion_mask[index].sum(-1).max())
        limits = {"token_ids": width, "attention_mask": width}
        chosen = {name: value[index] for name, value in self._tensors()}
        for name, value in chosen.items():
            if value.dim() == 2:
                chosen[name] = value[:, : limits.get(name, max(depth, 1))]
        return Batch(**chosen)

    def _tensors(self) -> list[tuple[str, Tensor]]:
        named = [(item.name, getattr(self, item.name)) for item in fields(self)]
        return [(name, value) for name, value in named if value is not None]
