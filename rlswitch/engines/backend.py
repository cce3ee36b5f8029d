"""What a backend has to implement: one method per verb, in no particular order."""

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
    """Of each token, after temperature."""
    finish_reason: str


class Backend(ABC):
    """The verbs of one kind of engine. Engine enforces their order."""

    family: ProcessGroup
    """The processes that end with it; empty for a server that was already running."""

    @property
    @abstractmethod
    def pids(self) -> list[int]:
        """Processes whose memory is the engine's."""

    @abstractmethod
    def sleeping_bytes(self, level: str) -> int:
        """Bytes that `sleep(level)` has to free on this device."""

    @property
    @abstractmethod
    def block_size(self) -> int:
        """Tokens in one block of the prefix cache."""

    @abstractmethod
    def sleep(self, level: str) -> None:
        """Frees memory: level 0, kv, 1 or 2."""

    @abstractmethod
    def wake(self, tag: str) -> None:
        """Maps `weights` or `kv_cache` if the last sleep freed it; called for each, in this order."""

    @abstractmethod
    def reload(self, path: Path) -> None:
        """Loads the checkpoint in `path` into the mapped weights."""

    @abstractmethod
    def fingerprint(self) -> list[dict[str, Any]]:
        """Per worker: `received`, fingerprints by name of what it loaded; `live`, their sum as held."""

    @abstractmethod
    def reset_prefix_cache(self) -> bool:
        """Drops all cached prefixes; False if some are still in use."""

    @abstractmethod
    def generate(self, requests: Sequence[Request], into: dict[int, Completion]) -> None:
        """Puts each completion `into` its request's index as it finishes, so it survives a later failure."""

    @abstractmethod
    def score(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        """Log-probability of each token after the first, at temperature 1."""

    @abstractmethod
    def count_cached_tokens(self, sequences: Sequence[list[int]]) -> int:
        """How many tokens of these prompts the prefix cache serves."""

    @abstractmethod
    def close(self) -> None:
        """Ends the engine and its processes; may be called twice."""

    def abandon(self) -> None:
        """Kills a lost engine without asking it first: it may not answer."""
        self.family.end(ask=lambda: None)
        self.close()


def warm_up(backend: Backend, token_ids: list[int]) -> None:
    """The first forward passes build kernels and caches; their seconds belong to the start."""
    backend.score([token_ids * 2])
    backend.generate([Request(token_ids, seed=0, max_new_tokens=2, temperature=1.0)], {})
