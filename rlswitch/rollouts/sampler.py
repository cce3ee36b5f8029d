"""A sampler turns prompts into rollouts; an environment is a sampler that takes several turns.

Tokens that the policy did not sample (an observation, a tool's output) stand in `Rollout.token_ids` like the
others, with `Rollout.learned` False: they condition what follows and are never learned from.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from rlswitch.engines.revival import RestartingEngine
from rlswitch.types import Group, Prompt, Sampling


class Sampler(ABC):
    """Samples the rollouts of a step and of an evaluation. It may call `engine.generate` more than once."""

    @abstractmethod
    def sample(self, engine: RestartingEngine, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """One group of `sampling.num_samples` rollouts for each prompt, in order, not yet scored.

        The engine holds the device and a proven version; all rollouts carry that version. A request's seed
        depends on (seed, step, prompt.index, sample) only, so that a resumed run samples the same tokens: for
        a later turn give each prompt its own `epoch`, `turn * group_size + sample`, or all members of a group
        draw the same numbers.
        """


class SingleTurn(Sampler):
    """The prompt, one completion, the end."""

    def sample(self, engine: RestartingEngine, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        return engine.generate(prompts, sampling)
