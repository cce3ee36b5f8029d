"""Engines that die, hang or fail to restart, on the real vLLM: their outputs stay the same."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import replace

import psutil
import pytest
from bench import Bench, open_bench
from samples import eventually
from worker import HUNG

from rlswitch.engines.backend import Backend
from rlswitch.engines.engine import Engine, State
from rlswitch.engines.revival import RestartingEngine
from rlswitch.errors import EngineError
from rlswitch.processes.group import ProcessGroup
from rlswitch.types import Group, PolicyWeights, Prompt, Sampling

pytestmark = pytest.mark.engine

PROMPTS = [Prompt(index=i, messages="1+2=", token_ids=[13, 1 + i, 10, 2, 11]) for i in range(8)]
SAMPLING = Sampling(num_samples=4, max_new_tokens=24, temperature=1.0, seed=0, step=1)


class Mortal:
    """An engine on a separate bench that is restarted whenever it is lost."""

    def __init__(self, bench: Bench):
        self.bench = bench
        self.said: list[str] = []
        self.families: list[ProcessGroup] = [bench.backend.family]
        self.engine = self.restarting(bench.engine(), self.start)

    def restarting(self, engine: Engine, start: Callable[[], Backend]) -> RestartingEngine:
        return RestartingEngine(engine, start, limit=2, log=self.said.append)

    def start(self) -> Backend:
        backend = self.bench.start()
        self.families.append(backend.family)
        return backend

    def doom(self, method: str, calls: int = 0, number: int = signal.SIGKILL) -> psutil.Process:
        """The worker that will receive the signal during `method`."""
        backend = self.engine.backend
        backend.collective_rpc("doom", call=method, calls=calls, number=int(number))
        return psutil.Process(backend.workers[0]["pid"])


@pytest.fixture(scope="module", params=["local", "server"])
def shared(request, tmp_path_factory) -> Iterator[Mortal]:
    with open_bench(tmp_path_factory.mktemp("lost"), request.param) as bench:
        mortal = Mortal(bench)
        yield mortal
        mortal.engine.close()


@pytest.fixture
def mortal(shared: Mortal) -> Mortal:
    shared.said.clear()
    return shared


def told(groups: list[Group]) -> list[tuple]:
    return [(it.token_ids, it.logprobs, it.policy_version) for group in groups for it in group.rollouts]


def turn(engine: RestartingEngine, weights: PolicyWeights) -> list[tuple]:
    """One turn on the device: wake, push, prove, generate, sleep."""
    engine.acquire(weights)
    assert engine.engine.proven and engine.version == weights.version
    groups = engine.generate(PROMPTS, SAMPLING)
    engine.release()
    return told(groups)


@pytest.mark.parametrize(("method", "calls"), [("execute_model", 12), ("reload_weights", 0)])
def test_a_killed_engine_is_replaced_and_nobody_can_tell(mortal: Mortal, method: str, calls: int) -> None:
    engine, weights = mortal.engine, mortal.bench.publish()
    expected = turn(engine, weights)
    restarts = engine.restarts
    victim = mortal.doom(method, calls)
    assert turn(engine, weights) == expected
    assert not victim.is_running()
    assert engine.restarts == restarts + 1
    (line,) = mortal.said
    assert line.startswith("rollout engine is lost and will be restarted: vLLM")


@pytest.mark.parametrize("shared", ["local"], indirect=True)
def test_only_what_was_not_finished_is_asked_again(mortal: Mortal, monkeypatch) -> None:
    engine, weights = mortal.engine, mortal.bench.publish()
    engine.acquire(weights)
    sampling = replace(SAMPLING, max_new_tokens=96)  # long: the first is complete well before the last starts
    lengths = [len(tokens) for tokens, _, _ in told(engine.generate(PROMPTS, sampling))]
    mortal.doom("execute_model", calls=max(lengths) // 2)  # a vLLM step generates a token for each
    calls: list[tuple[int, dict]] = []
    whole = type(engine.backend).generate

    def generate(self, requests, into):
        calls.append((len(requests), into))
        whole(self, requests, into)

    monkeypatch.setattr(type(engine.backend), "generate", generate)
    groups = engine.generate(PROMPTS, sampling)
    assert [len(tokens) for tokens, _, _ in told(groups)] == lengths
    (first, finished), *_, (again, _) = calls  # the new engine is warmed up in between
    assert first == len(lengths) and again == first - len(finished)
    assert 0 < len(finished) < first
    engine.release()


@pytest.mark.parametrize("shared", ["local"], indirect=True)
def test_a_silent_engine_counts_as_lost(mortal: Mortal) -> None:
    engine, weights = mortal.engine, mortal.bench.publish()
    expected = turn(engine, weights)
    victim = mortal.doom("execute_model", number=signal.SIGSTOP)
    engine.backend.deadline = engine.backend.deadline._replace(seconds=5.0)  # the next one has its own
    assert turn(engine, weights) == expected
    assert not victim.is_running()
    assert "silent for engine.request_timeout_s = 5" in mortal.said[0]


def test_a_step_may_have_more_tokens_than_vllm_takes_at_once(mortal: Mortal) -> None:
    """vLLM 0.32 on a CPU crashes if it splits a prompt that has a seed."""
    engine, weights = mortal.engine, mortal.bench.publish()
    engine.acquire(weights)
    restarts = engine.restarts
    long = [
        Prompt(index=i, messages="", token_ids=[13, *(1 + (i * j) % 9 for j in range(60 + i % 8))])
        for i in range(100)
    ]
    groups = engine.generate(long, replace(SAMPLING, num_samples=1, max_new_tokens=4))
    assert sum(len(it.token_ids) for it in long) > 4096 and len(groups) == 100
    assert engine.restarts == restarts
    engine.release()


@pytest.mark.parametrize("engine", ["local", "server"])
def test_an_engine_that_hangs_while_it_starts_is_given_up(tmp_path, monkeypatch, engine: str) -> None:
    note = tmp_path / "pids"
    monkeypatch.setenv(HUNG, str(note))
    monkeypatch.setattr("rlswitch.engines.vllm.server.SHUTDOWN_SECONDS", 1.0)  # it does not hear SIGTERM
    for seconds in (12, 60, 300):
        with (
            pytest.raises(EngineError, match=rf"did not start: .*engine.start_timeout_s = {seconds}"),
            open_bench(tmp_path, engine, start_timeout_s=float(seconds)),
        ):
            pytest.fail("it has started")
        if note.exists():
            break  # it reached the hang; on a busy machine it needs more time to get there
    processes = [int(pid) for pid in note.read_text().split()]
    assert len(processes) == 2
    assert eventually(lambda: not any(map(psutil.pid_exists, processes)))


def test_an_engine_that_never_comes_back_ends_the_run_with_its_log(mortal: Mortal) -> None:
    """Must run last: it leaves no engine behind."""
    engine, weights = mortal.engine, mortal.bench.publish()
    turn(engine, weights)
    engine.acquire(weights)
    mortal.doom("execute_model", calls=2)
    mortal.bench.spec.settings.vllm["worker_cls"] = "nowhere.Worker"  # fails at every start
    with pytest.raises(EngineError, match=r"was lost 3 times in a row, engine.max_restarts = 2") as error:
        engine.generate(PROMPTS, SAMPLING)
    assert "did not start" in str(error.value)
    assert "its log: " in str(error.value) and "initialization failed" in str(error.value)
    assert engine.engine.state is State.FAILED
    assert len(mortal.said) == 2


def test_nothing_of_them_is_left(shared: Mortal) -> None:
    processes = [process for family in shared.families for process in family.processes]
    assert len(shared.families) > 1 and len(processes) >= 2 * len(shared.families)
    assert not psutil.wait_procs(processes, timeout=120)[1]
