"""The settings of a whole run, and what can be chosen by name. Imports no torch and no vLLM."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from rlswitch.algorithms.base import Algorithm
from rlswitch.algorithms.grpo import GRPO
from rlswitch.algorithms.ppo import PPO
from rlswitch.algorithms.reinforce import Reinforce
from rlswitch.algorithms.reinforce_pp import ReinforcePP
from rlswitch.algorithms.rloo import RLOO
from rlswitch.config import sections
from rlswitch.config.fields import Leaf, choice, leaves_of, number
from rlswitch.types import Sampling


@dataclass(kw_only=True, slots=True)
class Run:
    """All settings of a run, as train.py composes and checks them for rlswitch.loop.train."""

    recipe: str | None = None
    output_dir: str | None = None
    """null: runs/<recipe>, followed by the overrides of the recipe."""
    num_steps: int = number(100, at_least=1)
    """Rollouts and updates; raise it to continue a finished run."""
    seed: int = number(0, at_least=0, below=2**32)
    resume: str = "auto"
    """auto: from the newest valid checkpoint in output_dir; changed: the same, even if settings have changed;
    never; the path of a checkpoint; or changed:PATH."""
    mode: str = choice("train", "plan", "rewards")
    logger: list[str] = field(default_factory=lambda: ["wandb"])
    """accelerate's trackers by name: wandb (offline without a key), tensorboard, ...; [] for none."""
    project: str = "rlswitch"
    """Project name for the trackers."""
    model: sections.ModelConfig = field(default_factory=sections.ModelConfig)
    data: sections.DataConfig = field(default_factory=sections.DataConfig)
    reward: sections.RewardConfig = field(default_factory=sections.RewardConfig)
    judge: sections.JudgeConfig = field(default_factory=sections.JudgeConfig)
    reward_model: sections.RewardModelConfig = field(default_factory=sections.RewardModelConfig)
    rollout: sections.RolloutConfig = field(default_factory=sections.RolloutConfig)
    algorithm: Algorithm
    engine: sections.EngineConfig
    switch: sections.SwitchConfig = field(default_factory=sections.SwitchConfig)
    trainer: sections.TrainerConfig = field(default_factory=sections.TrainerConfig)
    checkpoint: sections.CheckpointConfig = field(default_factory=sections.CheckpointConfig)
    evaluation: sections.EvaluationConfig = field(default_factory=sections.EvaluationConfig)

    @property
    def max_model_len(self) -> int:
        return self.engine.max_model_len or self.data.max_prompt_tokens + self.rollout.max_new_tokens

    @property
    def tenants(self) -> dict[str, sections.TenantConfig]:
        """The settings of the models among the rewards, in the order of reward.functions."""
        return {name: getattr(self, name) for name in self.reward.functions if name in sections.TENANTS}

    def sampling(self, num_samples: int, step: int) -> Sampling:
        """How the rollouts of `step` are sampled, `num_samples` per prompt."""
        return Sampling(
            num_samples=num_samples,
            max_new_tokens=self.rollout.max_new_tokens,
            temperature=self.rollout.temperature,
            seed=self.seed,
            step=step,
        )


OPTIONS: dict[str, dict[str, type]] = {
    "algorithm": {
        "ppo": PPO,
        "grpo": GRPO,
        "rloo": RLOO,
        "reinforce_pp": ReinforcePP,
        "reinforce": Reinforce,
    },
    "engine": {"local": sections.EngineConfig, "server": sections.ServerEngineConfig},
}
"""What can be chosen by name. A new algorithm or engine needs one line here."""


MANDATORY = {
    "model.path": "a Hugging Face directory or hub id, or builtin:addition",
    "data.path": "a hub id, a JSONL, CSV or parquet file, or builtin:addition",
}


def register(recipe: str | None = None) -> None:
    """Registers the dataclasses with Hydra, with the name of the recipe as the default of Run.recipe."""
    store = ConfigStore.instance()
    store.store("run", OmegaConf.merge(OmegaConf.structured(Run), {"recipe": recipe}))
    for group, options in OPTIONS.items():
        for name, node in options.items():
            store.store(name, node, group=group)


def settings_of(configs: Collection[str] | None = None) -> dict[str, Leaf]:
    """Every dotted key for these choices ("algorithm/ppo"); None: for all choices together."""
    found = leaves_of(Run)
    for group, options in OPTIONS.items():
        for name, option in options.items():
            if configs is None or f"{group}/{name}" in configs:
                found |= leaves_of(option, f"{group}.")
    return found
