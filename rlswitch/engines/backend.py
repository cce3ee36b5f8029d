"""What an engine has to know how to do, whatever it is: one verb each, in no order of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlswitch.processes.group import ProcessGroup


@dataclass(frozen=True, slots=True)
class Request:
    token_ids: list[int]
    seed: int
    max_new_tokens: int
    temperature: float


@dataclass(frozen=True, slots=True)
class Completion:
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


class Backend(ABC):
    """The verbs of one kind of engine. No order is checked here: that is Engine's part."""

    family: ProcessGroup
    """The processes that end with it: none of a server that was there before."""

    @property
    @abstractmethod
    def pids(self) -> list[int]:
        """Processes whose memory is the engine's."""

    @abstractmethod
    def sleeping_bytes(self, level: str) -> int:
        """What `sleep(level)` has to free on this device."""

    @property
    @abstractmethod
    def block_size(self) -> int:
        """Tokens in one block of the prefix cache."""

    @abstractmethod
    def sleep(self, level: str) -> None:
        """Frees memory: level 0, kv, 1 or 2."""

    @abstractmethod
    def wake(self, tag: str) -> None:
        """Maps `weights` or `kv_cache` again if the last sleep took it; called for each, in this order."""

    @abstractmethod
    def reload(self, path: Path) -> None:
        """Loads the checkpoint in `path` into the mapped weights."""

    @abstractmethod
    def fingerprint(self) -> list[dict[str, Any]]:
        """Per worker: `received`, fingerprint by name of what the loader got; `live`, of what is held."""

    @abstractmethod
    def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes; False when some could not be."""

    @abstractmethod
    def generate(self, requests: Sequence[Request], into: dict[int, Completion]) -> None:
        """The completion of each request goes `into` its index as it is finished: it outlives the engine."""

    @abstractmethod
    def score(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        """Log-probability of each token after the first, at temperature 1."""

    @abstractmethod
    def count_cached_tokens(self, sequences: Sequence[list[int]]) -> int:
        """How many tokens of these prompts the prefix cache answers."""

    @abstractmethod
    def close(self) -> None:
        """Ends the engine and its processes; may be called again."""

    def abandon(self) -> None:
        """Ends an engine that is lost: it is not asked first, it may not answer."""
        self.family.end(ask=lambda: None)
        self.close()


def warm_up(backend: Backend, token_ids: list[int]) -> None:
    """The first forward passes build kernels and caches: seconds that belong to the start."""
    backend.score([token_ids * 2])
    backend.generate([Request(token_ids, seed=0, max_new_tokens=2, temperature=1.0)], {})
