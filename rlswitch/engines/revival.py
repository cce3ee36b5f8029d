"""Restarting a lost engine: a new backend, the current version again, only the unfinished requests."""

from collections.abc import Callable, Sequence

from rlswitch.engines.backend import Backend, Completion
from rlswitch.engines.engine import Engine
from rlswitch.errors import EngineError
from rlswitch.text import first_line
from rlswitch.types import Group, PolicyWeights, Prompt, Sampling


class RestartingEngine:
    """A tenant that outlives its backends: what everybody but the state machine holds.

    After a loss a new backend gets the current version, proves it and generates what was unfinished, with
    the same seeds. A failed proof is final: that backend is alive, and its contents are unknown.
    """

    def __init__(
        self, engine: Engine, start: Callable[[], Backend], limit: int, log: Callable[[str], None] = print
    ):
        """`start` starts another backend once the other tenants have left the device.

        `limit`: how many backends may be lost in a row, without a generation in between.
        """
        self.engine, self.start, self.limit, self.log = engine, start, limit, log
        self.name, self.tokenizer = engine.name, engine.tokenizer
        self.restarts = 0
        self._is_lost = False
        self._lost_in_a_row = 0

    @property
    def backend(self) -> Backend:
        return self.engine.backend

    @property
    def version(self) -> int | None:
        return self.engine.version

    @property
    def proven(self) -> bool:
        return self.engine.proven

    @property
    def canary_gap(self) -> float:
        return self.engine.canary_gap

    def acquire(self, weights: PolicyWeights | None) -> None:
        """As Engine.acquire. Raises EngineError only after one loss too many."""
        weights = self.engine.weights_to_serve(weights)
        while True:
            try:
                return self._serve(weights)
            except EngineError as error:
                self._give_up(error)

    def release(self) -> None:
        """As Engine.release; a lost engine holds nothing."""
        if self._is_lost:
            return
        try:
            self.engine.release()
        except EngineError as error:
            self._give_up(error)

    def unreleased(self) -> str | None:
        return self.engine.unreleased()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """As Engine.generate; after a loss only unfinished requests are sent again."""
        weights, completions = self.engine.serving(), dict[int, Completion]()
        while True:
            try:
                if self._is_lost:
                    with self.engine.ledger.between("", self.name):
                        self._serve(weights)
                self.engine.complete(prompts, sampling, completions)
                break
            except EngineError as error:
                self._give_up(error)
        self._lost_in_a_row = 0
        return self.engine.groups(prompts, sampling, completions)

    def forget_prefixes(self) -> None:
        self.engine.forget_prefixes()

    def metrics(self) -> dict[str, float]:
        return self.engine.metrics() | {"switch/restarts": float(self.restarts)}

    def close(self) -> None:
        self._is_lost = False
        self.engine.close()

    def _serve(self, weights: PolicyWeights) -> None:
        if self._is_lost:
            with self.engine.ledger.phase("restart"):
                backend = self.start()
            self.engine.adopt(backend)
            self.restarts += 1
            self._is_lost = False
        self.engine.serve(weights)

    def _give_up(self, error: EngineError) -> None:
        """Ends the lost backend. Raises EngineError if `limit` is exceeded."""
        self.engine.abandon()
        self._is_lost = True
        self._lost_in_a_row += 1
        if self._lost_in_a_row > self.limit:
            raise EngineError(
                f"{self.name} was lost {self._lost_in_a_row} times in a row, engine.max_restarts ="
                f" {self.limit}; the last time: {error}"
            ) from error
        self.log(f"{self.name} is lost and will be restarted: {first_line(error)}")
