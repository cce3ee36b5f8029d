"""Who holds the device, and the engine's state machine: every wrong order of calls raises."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeBackend, FakeTenant
from rlswitch.recipes.addition.task import build_tokenizer
from samples import make_spec

from rlswitch.config.sections import EngineConfig, ModelConfig, SwitchConfig
from rlswitch.engines.backend import Backend, Completion, Request
from rlswitch.engines.engine import Engine, State
from rlswitch.engines.revival import RestartingEngine
from rlswitch.engines.spec import Launch, engine_spec
from rlswitch.engines.start import BACKENDS, start_engine
from rlswitch.errors import EngineError, EngineLost, ProofError, SwitchError
from rlswitch.proof.checks import LEARNED_FLOOR, Tolerance
from rlswitch.seeds import request_seed
from rlswitch.switch.device import Device
from rlswitch.switch.ledger import Ledger
from rlswitch.switch.switch import Switch
from rlswitch.types import Canary, PolicyWeights, Prompt, Sampling


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(Device("cpu"), tmp_path)


# -- the switch --------------------------------------------------------------------------------


@pytest.fixture
def log() -> list[str]:
    return []


def test_the_holder_lets_go_before_the_next_takes_over(ledger: Ledger, log: list[str]):
    switch, a, b = Switch(ledger), FakeTenant("a", log), FakeTenant("b", log)
    switch.give_to(a)
    switch.give_to(b, pushed(3))
    switch.give_to(a)
    assert log == [
        "a acquires",
        "a releases",
        "b acquires 3",
        "b releases",
        "a acquires",
    ]
    assert switch.holder is a


def test_the_holder_itself_is_never_asked_to_let_go(ledger: Ledger, log: list[str]):
    switch, a = Switch(ledger), FakeTenant("a", log)
    switch.give_to(a)
    switch.give_to(a, pushed(1))
    assert log == ["a acquires", "a acquires 1"]


def test_a_device_that_is_not_given_back_stops_the_hand_over(ledger: Ledger, log: list[str]):
    a, b = FakeTenant("a", log, keeps="2.00 GiB of weights"), FakeTenant("b", log)
    switch = Switch(ledger, holder=a)
    for _ in range(2):  # a retry fails too
        with pytest.raises(SwitchError) as caught:
            switch.give_to(b)
        assert "a did not give the device back: 2.00 GiB of weights; b was not started" in str(caught.value)
        assert switch.holder is a
    a.keeps = None
    switch.give_to(b)
    assert log == ["a releases", "a releases", "a releases", "b acquires"]


def test_a_release_that_fails_does_not_pass_the_device_on(ledger: Ledger, log: list[str]):
    a, b = FakeTenant("a", log, fails="no memory"), FakeTenant("b", log)
    switch = Switch(ledger, holder=a)
    with pytest.raises(OSError, match="no memory"):
        switch.give_to(b)
    assert log == ["a releases"] and switch.holder is a


def test_vacate_leaves_nobody(ledger: Ledger, log: list[str]):
    a, b = FakeTenant("a", log), FakeTenant("b", log)
    switch = Switch(ledger, holder=a)
    switch.vacate()
    switch.vacate()
    assert switch.holder is None and log == ["a releases"]
    switch.give_to(b)
    assert log == ["a releases", "b acquires"]


def test_vacate_checks_that_the_device_came_back(ledger: Ledger, log: list[str]):
    switch = Switch(ledger, holder=FakeTenant("a", log, keeps="everything"))
    with pytest.raises(SwitchError, match="the next tenant was not started"):
        switch.vacate()


# -- the engine --------------------------------------------------------------------------------


def pushed(version: int) -> PolicyWeights:
    return PolicyWeights(
        version=version,
        path=Path(f"/nowhere/v{version}"),
        nbytes=100 + version,
        fingerprint=1000 + version,
        tensors={"w": 1000 + version},
        canary=Canary(sequences=[[1, 2, 3]], logprobs=[[-1.0 - version, -2.0]]),
    )


WEIGHTS = [pushed(version) for version in range(6)]
PROMPTS = [
    Prompt(index=4, messages="", token_ids=[1, 2]),
    Prompt(index=9, messages="", token_ids=[3]),
]
SAMPLING = Sampling(num_samples=2, max_new_tokens=3, temperature=0.5, seed=1, step=0)
PUSH = ["wake weights", "reload", "fingerprint", "wake kv_cache", "reset", "count cached", "score"]


@pytest.fixture
def build(ledger: Ledger) -> Callable[..., Engine]:
    """build(level="1", asleep=True, gap=0.1): an Engine over a FakeBackend set up like this."""

    def make(
        *,
        level: str = "2",
        verify: str = "every",
        asleep: bool = True,
        base_weights: PolicyWeights | None = None,
        **faults: Any,
    ) -> Engine:
        backend = FakeBackend(shelf={weights.path: weights for weights in WEIGHTS}, loaded=base_weights)
        spec = make_spec(level=level, verify=verify)
        engine = Engine(spec, backend, build_tokenizer(), ledger, Tolerance(1e-4), base_weights)
        if asleep:
            engine.release()
        backend.log.clear()
        for name, value in faults.items():
            setattr(backend, name, value)
        return engine

    return make


def phases(ledger: Ledger, tmp_path: Path) -> list[str]:
    return [json.loads(line)["phase"] for line in (tmp_path / "switch.jsonl").open()]


def test_a_push_is_woken_loaded_and_proven_in_this_order(build, ledger, tmp_path):
    engine = build()
    engine.acquire(WEIGHTS[3])
    assert engine.backend.log == PUSH
    assert (engine.state, engine.version, engine.proven) == (State.READY, 3, True)
    assert phases(ledger, tmp_path)[1:] == [
        "wake_weights",
        "reload",
        "verify",
        "wake_kv_cache",
        "reset_prefix_cache",
        "verify",
    ]


def test_acquiring_what_is_served_already_does_nothing(build):
    engine = build()
    engine.acquire(WEIGHTS[1])
    engine.backend.log.clear()
    engine.acquire(WEIGHTS[1])
    engine.acquire(None)
    assert engine.backend.log == []


def test_a_newer_version_goes_through_sleep_even_when_the_engine_is_awake(build):
    engine = build()
    engine.acquire(WEIGHTS[1])
    engine.backend.log.clear()
    engine.acquire(WEIGHTS[2])
    assert engine.backend.log == ["sleep 2", *PUSH]
    assert engine.version == 2


def test_an_older_version_is_a_push_like_any_other(build):
    engine = build(level="1")
    engine.acquire(WEIGHTS[2])
    engine.acquire(WEIGHTS[1])
    assert engine.version == 1 and engine.backend.loaded is WEIGHTS[1]


def test_level_2_forgets_the_weights(build):
    engine = build()
    engine.acquire(WEIGHTS[1])
    engine.release()
    assert (engine.state, engine.version) == (State.ASLEEP, None)
    with pytest.raises(SwitchError, match="holds no published weights"):
        engine.acquire(None)
    engine.backend.log.clear()
    engine.acquire(WEIGHTS[1])
    assert engine.backend.log == PUSH


@pytest.mark.parametrize("level", ["1", "kv", "0"])
def test_other_levels_keep_the_weights_and_prove_them_again_without_a_push(build, level: str):
    engine = build(level=level)
    engine.acquire(WEIGHTS[1])
    engine.release()
    assert engine.version == 1
    for weights in (None, WEIGHTS[1]):
        engine.release()
        engine.backend.log.clear()
        engine.acquire(weights)
        expected = ["wake weights", "wake kv_cache", "reset", "count cached", "score"]
        assert engine.backend.log == expected
        assert engine.proven


def test_weights_that_changed_while_asleep_at_level_1_are_found_out(build):
    engine = build(level="1")
    engine.acquire(WEIGHTS[1])
    engine.release()
    engine.backend.gap = 0.3
    with pytest.raises(ProofError, match="canary"):
        engine.acquire(None)
    assert engine.state is State.FAILED


def test_letting_go_twice_sleeps_once(build):
    engine = build(asleep=False)
    engine.release()
    engine.release()
    assert engine.backend.log == ["sleep 2"]


def test_an_engine_that_keeps_its_memory_says_so_until_it_has_slept_again(build):
    engine = build(asleep=False, owes=10 * 2**20)
    engine.release()
    assert engine.unreleased() == "sleep level 2 freed 0 of 10 MiB"
    engine.backend.owes = 0
    engine.acquire(WEIGHTS[1])
    engine.release()
    assert engine.unreleased() is None


def test_verify_first_proves_the_first_push_only(build):
    engine = build(verify="first")
    engine.acquire(WEIGHTS[1])
    assert engine.backend.log == PUSH and engine.metrics()["switch/verified"] == 1
    engine.backend.log.clear()
    engine.acquire(WEIGHTS[2])
    assert engine.backend.log == ["sleep 2", "wake weights", "reload", "wake kv_cache", "reset"]
    assert engine.metrics()["switch/verified"] == 0


def test_verify_off_proves_nothing_and_says_so(build):
    engine = build(verify="off", stale=True, gap=5.0, cached=99)
    engine.acquire(WEIGHTS[1])
    assert engine.state is State.READY
    assert {"fingerprint", "score", "count cached"}.isdisjoint(engine.backend.log)
    assert engine.metrics()["switch/verified"] == 0


VERBS: dict[str, Callable[[Engine], object]] = {
    "wake_weights": lambda engine: engine.wake_weights(),
    "reload": lambda engine: engine.reload(WEIGHTS[1]),
    "wake_kv_cache": lambda engine: engine.wake_kv_cache(),
    "make_ready": lambda engine: engine.make_ready(),
    "generate": lambda engine: engine.generate(PROMPTS, SAMPLING),
    "release": lambda engine: engine.release(),
}
ALLOWED = {
    State.ASLEEP: {"wake_weights", "release"},
    State.WEIGHTS: {"reload", "wake_kv_cache"},
    State.AWAKE: {"make_ready"},
    State.READY: {"generate", "release"},
    State.FAILED: set(),
}


def bring_to(engine: Engine, state: State) -> None:
    steps = ["wake_weights", "reload", "wake_kv_cache", "make_ready"]
    reached = {State.ASLEEP: 0, State.WEIGHTS: 2, State.AWAKE: 3, State.READY: 4, State.FAILED: 4}
    for verb in steps[: reached[state]]:
        VERBS[verb](engine)
    if state is State.FAILED:
        engine.backend.broken = "sleep 2"
        with pytest.raises(RuntimeError):
            engine.release()
    assert engine.state is state


@pytest.mark.parametrize("verb", list(VERBS))
@pytest.mark.parametrize("state", list(State))
def test_a_verb_works_in_its_state_and_in_every_other_raises_without_touching_vllm(
    build, state: State, verb: str
):
    engine = build()
    bring_to(engine, state)
    engine.backend.broken = ""
    engine.backend.log.clear()
    if verb in ALLOWED[state]:
        VERBS[verb](engine)
        return
    with pytest.raises(SwitchError, match=f"rollout engine is {state}: cannot "):
        VERBS[verb](engine)
    assert engine.backend.log == [] and engine.state is state


def test_the_kv_cache_is_not_woken_before_the_weights_mean_something(build):
    engine = build()
    engine.wake_weights()
    with pytest.raises(SwitchError, match="has woken without weights: reload published weights"):
        engine.wake_kv_cache()
    assert engine.backend.log == ["wake weights"]


def test_a_fresh_engine_does_not_generate_from_its_own_checkpoint(build):
    engine = build(asleep=False)
    with pytest.raises(SwitchError, match="holds no published weights"):
        engine.generate(PROMPTS, SAMPLING)
    assert engine.backend.log == []


@pytest.mark.parametrize("verb", PUSH)
def test_a_verb_that_fails_half_way_fails_the_engine_for_good(build, verb: str):
    engine = build(broken=verb)
    with pytest.raises(RuntimeError, match=f"{verb} broke"):
        engine.acquire(WEIGHTS[1])
    assert engine.state is State.FAILED
    engine.backend.broken = ""
    done = list(engine.backend.log)
    for attempt in (
        lambda: engine.acquire(WEIGHTS[1]),
        lambda: engine.acquire(WEIGHTS[2]),
        engine.release,
        lambda: engine.generate(PROMPTS, SAMPLING),
    ):
        with pytest.raises(SwitchError, match="is failed"):
            attempt()
    assert engine.backend.log == done


def test_a_closed_engine_does_nothing_any_more(build):
    engine = build()
    engine.acquire(WEIGHTS[1])
    engine.close()
    for verb in VERBS.values():
        with pytest.raises(SwitchError, match="is failed"):
            verb(engine)


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ({"cached": 32}, ProofError, "prefix cache: 32 tokens"),
        ({"gap": 0.2}, ProofError, r"canary: a log-probability differs by 0\.2"),
        ({"gap": math.nan}, ProofError, "canary: a log-probability differs by inf"),
        ({"resets": False}, EngineError, "could not reset its prefix cache"),
    ],
)
def test_a_push_that_is_not_proven_never_generates(build, fault, error, message):
    engine = build(**fault)
    with pytest.raises(error, match=message):
        engine.acquire(WEIGHTS[1])
    with pytest.raises(SwitchError):
        engine.generate(PROMPTS, SAMPLING)
    assert "generate" not in engine.backend.log


def test_stale_weights_are_found_before_the_kv_cache_is_woken(build):
    engine = build()
    engine.acquire(WEIGHTS[1])
    engine.backend.stale = True
    engine.backend.log.clear()
    with pytest.raises(ProofError, match="tensors differ: w"):
        engine.acquire(WEIGHTS[2])
    assert "wake kv_cache" not in engine.backend.log


# -- frozen engines ----------------------------------------------------------------------------


def own(version: int) -> PolicyWeights:
    return replace(pushed(version), version=0, initial_fingerprints=[1000 + version])


def test_two_frozen_engines_take_turns_and_reload_their_own_checkpoints(build, ledger):
    a, b = build(base_weights=own(1)), build(base_weights=own(2))
    switch = Switch(ledger)
    for engine in (a, b, a, b):
        switch.give_to(engine)
        assert (engine.version, engine.proven) == (0, True)
    assert a.backend.log == [*PUSH, "sleep 2", *PUSH, "sleep 2"]
    assert b.backend.log == [*PUSH, "sleep 2", *PUSH]
    assert (a.backend.loaded, b.backend.loaded) == (WEIGHTS[1], WEIGHTS[2])


def test_a_frozen_engine_at_level_1_wakes_with_its_weights(build):
    engine = build(level="1", base_weights=own(1))
    engine.acquire(None)
    assert engine.backend.log == ["wake weights", "wake kv_cache", "reset", "count cached", "score"]
    assert engine.proven


def test_a_frozen_engine_must_hold_what_it_held_at_the_start(build):
    engine = build(base_weights=replace(own(1), initial_fingerprints=[999]))
    with pytest.raises(ProofError, match=r"wake-up with /nowhere/v1 is not proven: fingerprint.* holds"):
        engine.acquire(None)


def test_a_worker_that_could_not_tell_at_the_start_is_not_asked_for_the_published_sum(build):
    engine = build(base_weights=replace(own(1), initial_fingerprints=[None]))
    engine.backend.loaded = None
    engine.backend.fingerprint = lambda: [{"received": WEIGHTS[1].tensors, "live": None}]
    engine.acquire(None)
    assert engine.proven


# -- lost engines ------------------------------------------------------------------------------


@pytest.fixture
def mortal(build) -> Callable[..., tuple[RestartingEngine, list[FakeBackend], list[str]]]:
    """mortal(dies=[...]): an engine whose n-th backend is lost in dies[n]; its backends; the log lines."""

    def make(dies: Sequence[str], limit: int = 2, **settings: Any):
        engine, said = build(**settings), []
        backends = [engine.backend]

        def start() -> Backend:
            backends.append(MortalBackend(shelf=engine.backend.shelf, loaded=engine.base_weights))
            backends[-1].dies_in = dies[len(backends) - 1] if len(backends) <= len(dies) else ""
            backends[-1]._do("start")
            return backends[-1]

        engine.backend = backends[0] = MortalBackend(shelf=engine.backend.shelf, loaded=engine.base_weights)
        engine.backend.dies_in = dies[0]
        return RestartingEngine(engine, start, limit, said.append), backends, said

    return make


@dataclass
class MortalBackend(FakeBackend):
    """Is lost in the verb that it is set to die in, half-way through a generation."""

    dies_in: str = ""

    def _do(self, verb: str) -> None:
        super()._do(verb)
        if verb == self.dies_in:
            raise EngineLost(f"vLLM has died ({verb})")

    def generate(self, requests: Sequence[Request], into: dict[int, Completion]) -> None:
        self.requests = list(requests)
        half = Completion([1], [-1.0], "stop")
        if self.dies_in == "generate":
            into[1] = half
        self._do("generate")
        into.update({index: replace(half, token_ids=[2]) for index in range(len(requests))})

    def abandon(self) -> None:
        self._do("abandon")


@pytest.mark.parametrize("verb", PUSH)
def test_an_engine_lost_in_a_push_is_pushed_to_again_and_proven(mortal, verb: str):
    engine, (first, *_), said = mortal([verb])
    engine.acquire(WEIGHTS[1])
    assert first.log[-2:] == [verb, "abandon"]
    assert engine.backend.log == ["start", "sleep 2", *PUSH]
    assert (engine.version, engine.engine.proven, engine.restarts) == (1, True, 1)
    assert said == [f"rollout engine is lost and will be restarted: vLLM has died ({verb})"]


def test_an_engine_that_was_started_again_proves_its_first_push_again(mortal):
    engine, _, _ = mortal(["generate"], verify="first")
    for version in (1, 2):
        engine.acquire(WEIGHTS[version])
    assert not engine.engine.proven
    engine.generate(PROMPTS, SAMPLING)
    assert (engine.restarts, engine.version, engine.engine.proven) == (1, 2, True)
    assert engine.backend.log == ["start", "sleep 2", *PUSH, "generate"]


def test_only_what_was_not_finished_is_asked_again_with_the_same_seeds(mortal, ledger, tmp_path):
    engine, backends, _ = mortal(["generate"])
    engine.acquire(WEIGHTS[3])
    with ledger.work("rollout"):
        groups = engine.generate(PROMPTS, SAMPLING)
    first, second = backends
    assert second.log == ["start", "sleep 2", *PUSH, "generate"]
    assert second.requests == [first.requests[0], *first.requests[2:]]
    assert [r.token_ids for group in groups for r in group.rollouts] == [[2], [1], [2], [2]]
    assert {r.policy_version for group in groups for r in group.rollouts} == {3}
    rows = [json.loads(line) for line in (tmp_path / "switch.jsonl").open()]
    assert [row["to"] for row in rows if row["phase"] == "restart"] == ["rollout engine"]


def test_an_engine_lost_in_its_sleep_is_missed_when_it_is_needed(mortal, ledger, log):
    engine, backends, _ = mortal(["sleep 2"])
    switch = Switch(ledger)
    switch.give_to(engine, WEIGHTS[1])
    switch.give_to(FakeTenant("trainer", log))
    assert log == ["trainer acquires"] and len(backends) == 1
    switch.give_to(engine, WEIGHTS[2])
    assert (engine.version, len(backends)) == (2, 2)


def test_a_frozen_engine_that_is_lost_proves_its_checkpoint_again(mortal):
    engine, backends, _ = mortal(["generate"], level="1", base_weights=own(1))
    engine.acquire(None)
    engine.generate(PROMPTS, SAMPLING)
    assert backends[1].log == ["start", "sleep 1", *PUSH, "generate"]
    assert engine.engine.proven and engine.version == 0


@pytest.mark.parametrize("verb", ["start", "wake weights", "generate"])
def test_too_many_in_a_row_end_the_run_with_the_last_reason(mortal, verb: str):
    engine, backends, said = mortal(["generate", verb, verb])
    engine.acquire(WEIGHTS[1])
    lost_for_good = rf"lost 3 times in a row, engine.max_restarts = 2; .*vLLM has died \({verb}\)"
    with pytest.raises(EngineError, match=lost_for_good):
        engine.generate(PROMPTS, SAMPLING)
    assert len(backends) == 3 and len(said) == 2


def test_a_generation_in_between_starts_the_count_anew(mortal):
    engine, _, _ = mortal(["generate"], limit=1)
    for version in range(1, 4):
        engine.acquire(WEIGHTS[version])
        engine.generate(PROMPTS, SAMPLING)
        engine.backend.dies_in = "generate"  # the next time
    assert engine.restarts == 3


def test_a_proof_that_fails_is_not_started_again(mortal):
    engine, backends, _ = mortal([""])
    engine.backend.gap = 0.3
    with pytest.raises(ProofError):
        engine.acquire(WEIGHTS[1])
    assert len(backends) == 1
    with pytest.raises(SwitchError, match="is failed"):
        engine.acquire(WEIGHTS[1])
    assert len(backends) == 1


# -- the one door ------------------------------------------------------------------------------


def test_auto_is_resolved_and_only_exact_arithmetic_has_a_fixed_tolerance():
    def made(dtype: str, kind: str):
        model, switch = ModelConfig(path="m", dtype=dtype), SwitchConfig(canary_tolerance=1e-3)
        where = {"model_path": "/m", "max_model_len": 8, "seed": 0}
        return engine_spec("e", model, EngineConfig(), switch, Device(kind), **where)

    assert (made("auto", "cpu").dtype, made("auto", "cuda").dtype) == ("float32", "bfloat16")
    assert made("auto", "cpu").tolerance == made("float32", "cpu").tolerance == 1e-3
    assert made("bfloat16", "cpu").tolerance is None and made("float32", "cuda").tolerance is None


@pytest.fixture
def started(monkeypatch, ledger, tmp_path: Path):
    """started(spec, frozen=True, gap=0.1): start_engine over fake backends set up like this; all backends."""
    backends: list[FakeBackend] = []

    def start(spec, frozen: bool = False, **faults: Any):
        def backend(launch: Launch) -> FakeBackend:
            backends.append(FakeBackend(loaded=WEIGHTS[1], **faults))
            assert launch.spec is spec
            return backends[-1]

        monkeypatch.setitem(BACKENDS, type(spec.settings), backend)
        return start_engine(spec, build_tokenizer(), ledger, tmp_path / "log", tmp_path, frozen)

    return start, backends


def test_a_pushed_engine_learns_its_tolerance_and_a_frozen_one_has_nothing_to_learn_from(started, tmp_path):
    start, _ = started
    spec = make_spec(model_path=str(tmp_path), tolerance=None)
    assert start(spec).engine.tolerance == Tolerance(None)
    frozen = start(spec, frozen=True).engine
    assert frozen.tolerance == Tolerance(None, mean=LEARNED_FLOOR) and frozen.base_weights.version == 0
    assert frozen.base_weights.initial_fingerprints == [WEIGHTS[1].fingerprint]
    assert start(make_spec(model_path=str(tmp_path)), frozen=True).engine.tolerance.largest == 1e-4


def test_a_frozen_engine_that_is_never_proven_is_not_scored(started, tmp_path):
    start, backends = started
    start(make_spec(model_path=str(tmp_path), verify="off"), frozen=True)
    assert backends[0].log == []


def test_an_engine_that_cannot_be_described_leaves_no_backend(started, tmp_path):
    start, backends = started
    with pytest.raises(RuntimeError, match="score broke"):
        start(make_spec(model_path=str(tmp_path)), frozen=True, broken="score")
    assert backends[0].log[-1] == "close"


# -- generation --------------------------------------------------------------------------------


def test_rollouts_come_back_grouped_stamped_and_decoded(build):
    engine = build()
    engine.acquire(WEIGHTS[5])
    groups = engine.generate(PROMPTS, SAMPLING)
    assert [group.prompt for group in groups] == PROMPTS
    assert [[r.sample for r in group.rollouts] for group in groups] == [[0, 1], [0, 1]]
    for rollout in (r for group in groups for r in group.rollouts):
        assert (rollout.policy_version, rollout.text, rollout.finish_reason) == (5, "7", "stop")
        assert (rollout.token_ids, rollout.logprobs) == ([7, 14], [-0.5, -0.25])


def test_completions_stay_with_their_prompts(build):
    engine = build(completions=[Completion([t], [-float(t)], "stop") for t in range(1, 5)])
    engine.acquire(WEIGHTS[1])
    groups = engine.generate(PROMPTS, SAMPLING)
    assert [[r.token_ids for r in group.rollouts] for group in groups] == [[[1], [2]], [[3], [4]]]
    sent = [(request.token_ids, request.seed) for request in engine.backend.requests]
    assert sent == [(p.token_ids, request_seed(1, 0, p.index, s)) for p in PROMPTS for s in (0, 1)]


def test_a_prompt_from_two_passes_over_the_data_is_not_asked_the_same_twice(build):
    engine = build()
    engine.acquire(WEIGHTS[1])
    again = [replace(prompt, epoch=1) for prompt in PROMPTS]
    engine.generate([*PROMPTS, *again], SAMPLING)
    seeds = [request.seed for request in engine.backend.requests]
    assert len(set(seeds)) == 2 * 2 * len(PROMPTS)


def test_every_request_has_a_seed_of_its_own_that_the_next_run_has_too(build):
    keys = [(s, t, p, n) for s in (0, 1) for t in range(4) for p in range(4) for n in range(4)]
    seeds = {key: request_seed(*key) for key in keys}
    assert len(set(seeds.values())) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds.values())
    assert request_seed(0, 0, 0, 0) == seeds[0, 0, 0, 0]
    assert request_seed(1, 23, 4, 5) != request_seed(12, 3, 4, 5)


GOOD = Completion([7], [-0.5], "stop")


@pytest.mark.parametrize(
    ("completions", "message"),
    [
        ([GOOD] * 3, "3 completions for 4 requests"),
        ([GOOD, GOOD, GOOD, Completion([], [], "stop")], "prompt 9 sample 1 came back with 0 tok"),
        ([GOOD, Completion([7, 8], [-0.5], "stop"), GOOD, GOOD], "prompt 4 sample 1 .* 2 tokens"),
    ],
)
def test_an_answer_that_is_not_a_rollout_is_refused(build, completions, message: str):
    engine = build(completions=completions)
    engine.acquire(WEIGHTS[1])
    with pytest.raises(EngineError, match=message):
        engine.generate(PROMPTS, SAMPLING)


def test_a_log_probability_that_is_no_number_is_the_trainers_to_leave_out(build):
    engine = build(completions=[GOOD, GOOD, Completion([7], [math.nan], "stop"), GOOD])
    engine.acquire(WEIGHTS[1])
    groups = engine.generate(PROMPTS, SAMPLING)
    assert math.isnan(groups[1].rollouts[0].logprobs[0])


def test_the_switch_alternates_engine_and_trainer(build, ledger, log, tmp_path):
    engine, trainer = build(), FakeTenant("trainer", log)
    switch = Switch(ledger, holder=trainer)
    for version in (1, 2):
        switch.give_to(engine, WEIGHTS[version])
        assert engine.generate(PROMPTS, SAMPLING)[0].rollouts[0].policy_version == version
        switch.give_to(trainer)
    assert log == ["trainer releases", "trainer acquires"] * 2
    # The second proof generates from the last prompt, then its prefix is dropped again.
    assert engine.backend.log == [*PUSH, "generate", "sleep 2", *PUSH, "reset", "generate", "sleep 2"]
    assert engine.backend.counted[-1][-1] == max((it.token_ids for it in PROMPTS), key=len)
    rows = [json.loads(line) for line in (tmp_path / "switch.jsonl").open()][1:]
    assert {(row["from"], row["to"]) for row in rows} == {
        ("trainer", "rollout engine"),
        ("rollout engine", "trainer"),
    }
    assert all(row["to"] == "trainer" for row in rows if row["phase"] == "sleep")
