"""Reward tenants: models that score rollouts and need the device for themselves while they do.

To add one, write a module with a `RewardTenant` and a `SPEC`, name it in `TENANTS` (config/sections.py), and
give it a section of settings: a `TenantConfig` that `Run` has under the same name. Nothing else knows it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from rlswitch.config.sections import TENANTS
from rlswitch.run import Run
from rlswitch.types import PolicyWeights, Prompt, Rollout, Score

if TYPE_CHECKING:  # they take seconds to import, and settings are checked before that
    from transformers import PreTrainedTokenizerBase

    from rlswitch.switch.ledger import Ledger

Log = Callable[[str], None]
"""Prints a line on the console."""


class RewardTenant(ABC):
    """A tenant of the switch (switch.Tenant) that scores rollouts once it holds the device.

    `acquire` takes device memory; `release` gives it back, also if there is none; `unreleased` says what it
    still holds, or None. It holds the device when it is made. `ledger.device.torch` is the device.
    """

    reward: ClassVar[str]
    """Its name in reward.functions, TENANTS and the metrics."""
    name: str
    """Its name in switch.jsonl and on the console: `device_name` of its settings."""

    @abstractmethod
    def acquire(self, weights: PolicyWeights | None) -> None: ...

    @abstractmethod
    def release(self) -> None: ...

    @abstractmethod
    def unreleased(self) -> str | None: ...

    @property
    @abstractmethod
    def pids(self) -> list[int]:
        """The processes that hold its memory."""

    @abstractmethod
    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """A score each; rollouts with the same prompt and completion get the same one."""

    @abstractmethod
    def close(self) -> None:
        """Ends every process that it started."""


StartTenant = Callable[["Ledger", Path, Path, Log], RewardTenant]
"""(ledger, output_dir, scratch, log) -> a tenant that holds the device.

`scratch` is removed even if this process is killed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantSpec:
    """What the rest of the program asks of one kind of tenant before it runs. Importing it loads no torch."""

    check: Callable[[Run, str, Sequence[Prompt]], object]
    """(run, path, prompts): raises ConfigError if the model in the directory `path` cannot score them."""
    prepare: Callable[[Run, Sequence[Prompt], PreTrainedTokenizerBase, Log], StartTenant]
    """(run, prompts, the policy's tokenizer, log): finds or makes the model. Raises ConfigError."""
    problems: Callable[[Run], Iterator[str]] = lambda run: iter(())
    """A line for each mistake in its settings."""


def spec_of(reward: str) -> TenantSpec:
    """The spec of the tenant that reward.functions calls `reward`."""
    return import_module(TENANTS[reward]).SPEC


def check_tenants(run: Run, prompts: Sequence[Prompt]) -> None:
    """Raises ConfigError for models in local directories; others have yet to be made or downloaded."""
    for reward, settings in run.tenants.items():
        if settings.path and Path(settings.path).is_dir():
            spec_of(reward).check(run, settings.path, prompts)


def prepare_tenants(
    run: Run, prompts: Sequence[Prompt], policy: PreTrainedTokenizerBase, log: Log
) -> dict[str, StartTenant]:
    """The models among the rewards by name, in the order of reward.functions. Raises ConfigError."""
    return {
        settings.device_name: spec_of(reward).prepare(run, prompts, policy, log)
        for reward, settings in run.tenants.items()
    }
