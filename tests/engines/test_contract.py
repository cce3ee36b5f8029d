"""The contract of every engine, on the real vLLM."""

import pytest
from bench import Bench

from rlswitch.engines.engine import State
from rlswitch.errors import SwitchError
from rlswitch.switch.device import resident_bytes
from rlswitch.training.logprobs import sequence_logprobs
from rlswitch.types import Prompt, Sampling

pytestmark = [pytest.mark.engine, pytest.mark.parametrize("bench", ["local", "server"], indirect=True)]

PROMPTS = [Prompt(index=i, messages="1+2=", token_ids=[13, 1, 10, 2, 11]) for i in range(4)]
SAMPLING = Sampling(num_samples=3, max_new_tokens=12, temperature=0.7, seed=0, step=1)


def rollouts_of(groups):
    return [(r.token_ids, r.logprobs) for group in groups for r in group.rollouts]


def test_rollouts_come_from_the_pushed_weights(bench: Bench) -> None:
    engine = bench.engine()
    weights = bench.publish()
    engine.acquire(weights)
    groups = engine.generate(PROMPTS, SAMPLING)
    assert len(groups) == 4 and all(len(group.rollouts) == 3 for group in groups)
    for group in groups:
        for rollout in group.rollouts:
            assert rollout.policy_version == weights.version
            sequence = rollout.prompt.token_ids + rollout.token_ids
            logits = bench.model(input_ids=_tensor(sequence)).logits[0, :-1] / SAMPLING.temperature
            expected = logits.log_softmax(-1).gather(-1, _tensor(sequence)[0, 1:, None])[:, 0]
            completion = expected[-len(rollout.token_ids) :].tolist()
            assert rollout.logprobs == pytest.approx(completion, abs=1e-4)


def test_engine_and_trainer_agree_on_the_canary_after_every_push(bench: Bench) -> None:
    engine = bench.engine()
    for _ in range(3):
        engine.release()
        weights = bench.publish()
        engine.acquire(weights)
        scored = bench.backend.score(bench.canary)
        for ours, theirs in zip(sequence_logprobs(bench.model, bench.canary), scored, strict=True):
            assert theirs == pytest.approx(ours, abs=1e-4)
        assert engine.metrics()["switch/verified"] == 1.0
        assert engine.version == weights.version


@pytest.mark.parametrize("level", ["0", "kv", "1", "2"])
def test_a_switch_at_any_level_keeps_the_outputs_bit_for_bit(bench: Bench, level: str) -> None:
    engine = bench.engine("2")
    weights = bench.publish()
    engine.acquire(weights)
    before = rollouts_of(engine.generate(PROMPTS, SAMPLING))
    engine.level = level
    engine.release()
    assert engine.unreleased() is None
    assert (engine.version is None) == (level == "2")
    engine.acquire(weights if level == "2" else None)
    assert engine.proven
    assert rollouts_of(engine.generate(PROMPTS, SAMPLING)) == before


@pytest.mark.parametrize("level", ["0", "kv", "1", "2"])
def test_new_weights_can_be_pushed_from_any_level(bench: Bench, level: str) -> None:
    engine = bench.engine(level)
    engine.acquire(bench.publish())
    engine.release()
    newer = bench.publish()
    engine.acquire(newer)
    assert engine.version == newer.version and engine.proven


def test_seeds_make_samples_and_depend_on_step_prompt_and_sample(bench: Bench) -> None:
    engine = bench.engine()
    engine.acquire(bench.publish())
    again = rollouts_of(engine.generate(PROMPTS, SAMPLING))
    assert rollouts_of(engine.generate(PROMPTS, SAMPLING)) == again
    assert len({tuple(tokens) for tokens, _ in again}) > 1
    later = Sampling(num_samples=3, max_new_tokens=12, temperature=0.7, seed=0, step=2)
    assert rollouts_of(engine.generate(PROMPTS, later)) != again


def test_sleep_really_frees_weights_and_cache_and_wake_takes_them_back(bench: Bench) -> None:
    engine = bench.engine("2")
    weights = bench.publish()
    pids = bench.backend.pids
    for _ in range(3):
        engine.acquire(weights)
        awake = resident_bytes(pids)
        engine.release()
        asleep = resident_bytes(pids)
        assert awake - asleep >= 0.9 * bench.backend.sleeping_bytes("2")
        assert engine.unreleased() is None


def test_a_sleep_that_frees_nothing_is_reported(bench: Bench, monkeypatch) -> None:
    engine = bench.engine("2")
    engine.acquire(bench.publish())
    monkeypatch.setattr(bench.backend, "sleep", lambda level: None)
    engine.release()
    assert "freed" in engine.unreleased() and "MiB" in engine.unreleased()


def test_generating_while_asleep_or_half_awake_raises_at_once(bench: Bench) -> None:
    engine = bench.engine()
    with pytest.raises(SwitchError, match="asleep"):
        engine.generate(PROMPTS, SAMPLING)
    engine.wake_weights()
    with pytest.raises(SwitchError, match="weights awake"):
        engine.generate(PROMPTS, SAMPLING)
    engine.reload(bench.publish())
    engine.wake_kv_cache()
    with pytest.raises(SwitchError, match="not proven"):
        engine.generate(PROMPTS, SAMPLING)
    engine.make_ready()
    assert engine.generate(PROMPTS, SAMPLING)


def test_wrong_orders_raise_and_leave_the_engine_usable(bench: Bench) -> None:
    engine = bench.engine()
    weights = bench.publish()
    with pytest.raises(SwitchError, match="reload"):
        engine.reload(weights)  # the weights are asleep
    with pytest.raises(SwitchError, match="KV cache"):
        engine.wake_kv_cache()
    engine.wake_weights()
    with pytest.raises(SwitchError, match="wake the weights"):
        engine.wake_weights()  # twice
    with pytest.raises(SwitchError, match="without weights"):
        engine.wake_kv_cache()  # level 2 discarded them
    engine.reload(weights)
    engine.wake_kv_cache()
    engine.make_ready()
    assert engine.state is State.READY and engine.version == weights.version


def test_an_engine_without_published_weights_has_nothing_to_serve(bench: Bench) -> None:
    engine = bench.engine()
    with pytest.raises(SwitchError, match="published weights"):
        engine.acquire(None)


def _tensor(tokens: list[int]):
    import torch

    return torch.tensor([tokens])
