"""Fakes for the package's interfaces: an engine's backend, a tenant, and a real session on a fake backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlswitch.checkpoint.resume import LoopState, Start
from rlswitch.data.prompts import load_prompts, read_tables
from rlswitch.engines.backend import Backend, Completion, Request
from rlswitch.engines.engine import Engine
from rlswitch.engines.revival import RestartingEngine
from rlswitch.planning.policy import policy_spec
from rlswitch.processes.signals import StopSignals
from rlswitch.proof.checks import Tolerance
from rlswitch.records.health import Health
from rlswitch.records.monitor import Monitor
from rlswitch.rewards.models.tenant import RewardTenant
from rlswitch.rewards.rewards import Rewards
from rlswitch.rollouts.sampler import Sampler, SingleTurn
from rlswitch.run import Run
from rlswitch.session import Session
from rlswitch.switch.switch import Switch
from rlswitch.types import PolicyWeights, Rollout, Score

BUILD = "rlswitch.build.build"
"""Replaced where a test runs the loop itself."""
FRESH = Start(None, LoopState(), kept=0, given_up=[])


@dataclass
class FakeBackend(Backend):
    """Does nothing, records its calls, and makes the mistakes that it is set to make."""

    log: list[str] = field(default_factory=list)
    broken: str = ""
    """The verb that raises."""
    during: dict[str, Callable[[], object]] = field(default_factory=dict)
    """Called in the middle of a verb."""
    frees: int = 0
    owes: int = 0
    cached: int = 0
    resets: bool = True
    stale: bool = False
    """Ignores the weights that it should load."""
    gap: float = 0.0
    completions: list[Completion] | None = None
    loaded: PolicyWeights | None = None
    shelf: dict[Path, PolicyWeights] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    counted: list[Sequence[list[int]]] = field(default_factory=list)

    def _do(self, verb: str) -> None:
        self.log.append(verb)
        if verb == self.broken:
            raise RuntimeError(f"{verb} broke")
        if verb in self.during:
            self.during[verb]()

    @property
    def pids(self) -> list[int]:
        return []

    @property
    def block_size(self) -> int:
        return 16

    def sleeping_bytes(self, level: str) -> int:
        return self.owes

    def sleep(self, level: str) -> None:
        self._do(f"sleep {level}")

    def wake(self, tag: str) -> None:
        self._do(f"wake {tag}")

    def reload(self, path: Path) -> None:
        self._do("reload")
        if not self.stale or self.loaded is None:
            self.loaded = self.shelf[path]

    def fingerprint(self) -> list[dict[str, Any]]:
        self._do("fingerprint")
        assert self.loaded is not None
        return [{"received": self.loaded.tensors, "live": self.loaded.fingerprint}]

    def reset_prefix_cache(self) -> bool:
        self._do("reset")
        return self.resets

    def generate(self, requests: Sequence[Request], into: dict[int, Completion]) -> None:
        self.requests = list(requests)
        self._do("generate")
        usual = [Completion([7, 14], [-0.5, -0.25], "stop") for _ in requests]
        into.update(enumerate(usual if self.completions is None else self.completions))

    def score(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        self._do("score")
        assert self.loaded is not None
        return [[x + self.gap for x in row] for row in self.loaded.canary.logprobs]

    def count_cached_tokens(self, sequences: Sequence[list[int]]) -> int:
        self._do("count cached")
        self.counted.append(sequences)
        return self.cached

    def close(self) -> None:
        self._do("close")


@dataclass(eq=False)
class FakeTenant(RewardTenant):
    """Records its requests and scores each text with `score_of`; None is an error."""

    name: str
    log: list[str]
    score_of: Callable[[str], float | None] = lambda text: None
    keeps: str | None = None
    """Memory that it does not release."""
    fails: str = ""
    """Why its release fails."""

    @property
    def reward(self) -> str:  # type: ignore[override]
        return self.name.replace(" ", "_")

    @property
    def pids(self) -> list[int]:
        return []

    def acquire(self, weights: PolicyWeights | None) -> None:
        self.log.append(f"{self.name} acquires{f' {weights.version}' if weights else ''}")

    def release(self) -> None:
        self.log.append(f"{self.name} releases")
        if self.fails:
            raise OSError(self.fails)

    def unreleased(self) -> str | None:
        return self.keeps

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        self.log.append(f"{self.name} scores {len(rollouts)}")
        found = [(it.text, self.score_of(it.text)) for it in rollouts]
        return [
            Score(value=s, error="" if s is not None else "fell silent", extra={self.reward: t})
            for t, s in found
        ]

    def close(self) -> None:
        self.log.append(f"{self.name} closes")


def build_session(
    run: Run,
    backend: FakeBackend,
    trainer: Any,
    tokenizer: Any,
    stop_signals: StopSignals,
    stack: ExitStack,
    start: Start = FRESH,
    sampler: Sampler | None = None,
) -> Session:
    """A run's Session with a fake backend; loop, trainer, rewards and files are real."""
    publish = trainer.publish

    def publish_for_backend() -> PolicyWeights:
        weights = publish()
        backend.shelf[weights.path] = weights
        return weights

    trainer.publish = publish_for_backend
    ledger = trainer.ledger
    prompts, held_out = load_prompts(run, read_tables(run), tokenizer, lambda line: None)
    spec = policy_spec(run, run.model.path, ledger.device)
    output_dir = Path(run.output_dir or "")
    monitor = stack.enter_context(Monitor(run, output_dir))
    engine = Engine(spec, backend, tokenizer, ledger, Tolerance(spec.tolerance))
    engine = RestartingEngine(engine, lambda: backend, limit=0)
    engine.release()
    rewards = Rewards(run.reward, log=monitor.log_line)
    stack.callback(rewards.close)
    return Session(
        run=run,
        ledger=ledger,
        monitor=monitor,
        switch=Switch(ledger, holder=trainer),
        engine=engine,
        sampler=sampler or SingleTurn(),
        trainer=trainer,
        rewards=rewards,
        prompts=prompts,
        held_out=held_out,
        tokenizer=tokenizer,
        output_dir=output_dir,
        stop_signals=stop_signals,
        health=Health(
            output_dir,
            monitor.log_line,
            lambda: None,
            start.kept,
            start.state.skipped_in_a_row,
            start.state.flat_in_a_row,
        ),
        saved_step=start.kept,
    )
