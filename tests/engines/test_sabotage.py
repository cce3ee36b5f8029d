"""Every known way for a push to fail, injected into the real vLLM.

Each test names the check that must catch it; the other checks must pass.
"""

import pytest
import torch
from bench import Bench
from safetensors.torch import load_file, save_file

from rlswitch.engines.engine import Engine, State
from rlswitch.errors import ProofError, SwitchError
from rlswitch.proof import checks as proof
from rlswitch.proof.fingerprint import named_fingerprints, total_fingerprint
from rlswitch.types import PolicyWeights, Prompt, Sampling

pytestmark = pytest.mark.engine

PROMPT = Prompt(index=0, messages="1+2=", token_ids=[13, 1, 10, 2, 11])
SAMPLING = Sampling(num_samples=1, max_new_tokens=4, temperature=1.0, seed=0, step=1)
Q, K = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qk")


def refused(engine: Engine, weights: PolicyWeights, check: str) -> str:
    """Asserts that the push fails in `check` and that the engine can never generate again."""
    with pytest.raises(ProofError, match=f"version {weights.version} is not proven: {check}") as error:
        engine.acquire(weights)
    assert engine.state is State.FAILED
    with pytest.raises(SwitchError):
        engine.generate([PROMPT], SAMPLING)
    return str(error.value)


def edit(weights: PolicyWeights, change) -> None:
    """Applies `change` to the tensors of the published file, unknown to the publisher."""
    file = weights.path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, file, {"format": "pt"})


def asleep(bench: Bench, level: str = "2") -> Engine:
    """An engine that has served one version and sleeps."""
    engine = bench.engine(level)
    engine.acquire(bench.publish())
    engine.release()
    return engine


def test_the_same_steps_without_sabotage_are_proven(bench: Bench) -> None:
    engine = asleep(bench)
    weights = bench.publish()
    edit(weights, lambda tensors: None)
    engine.acquire(weights)
    assert engine.proven


def test_reload_without_a_path(bench: Bench, monkeypatch) -> None:
    engine = asleep(bench)
    monkeypatch.setattr(bench.backend, "reload", lambda path: bench.rpc("reload_weights"))
    message = refused(engine, bench.publish(), "fingerprint")
    assert "as published, so the engine loaded something else" in message


def test_reload_of_an_old_versions_path(bench: Bench, monkeypatch) -> None:
    engine = asleep(bench)
    old, new, reload = bench.publish(), bench.publish(), bench.backend.reload
    monkeypatch.setattr(bench.backend, "reload", lambda path: reload(old.path))
    refused(engine, new, "fingerprint")


def test_an_update_too_small_for_logprobs_to_show(bench: Bench, monkeypatch) -> None:
    engine = asleep(bench)
    old, new, reload = bench.publish(), bench.publish(noise=1e-8), bench.backend.reload
    gaps = [
        abs(a - b)
        for ours, theirs in zip(old.canary.logprobs, new.canary.logprobs, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    assert max(gaps) < 1e-4  # the canary alone would pass
    monkeypatch.setattr(bench.backend, "reload", lambda path: reload(old.path))
    refused(engine, new, "fingerprint")


@pytest.mark.parametrize("name", [Q, "model.norm.weight", "model.embed_tokens.weight"])
def test_one_tensor_missing(bench: Bench, name: str) -> None:
    engine, weights = asleep(bench), bench.publish()
    edit(weights, lambda tensors: tensors.pop(name))
    assert f"tensors missing: {name}" in refused(engine, weights, "fingerprint")


def test_one_tensor_cut_short(disposable_bench: Bench) -> None:
    engine, weights = asleep(disposable_bench), disposable_bench.publish()
    edit(weights, lambda tensors: tensors.update({Q: tensors[Q][:-1]}))
    assert "not what was published" in refused(engine, weights, "reload")


def test_the_end_of_one_tensor_not_written(bench: Bench) -> None:
    engine, weights = asleep(bench), bench.publish()
    edit(weights, lambda tensors: tensors[Q][-1].zero_())
    assert f"tensors differ: {Q}" in refused(engine, weights, "fingerprint")


def test_one_bit_flipped(bench: Bench) -> None:
    engine, weights = asleep(bench), bench.publish()

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[K].view(torch.int32)[7, 3] ^= 1

    edit(weights, flip)
    message = refused(engine, weights, "fingerprint")
    assert f"tensors differ: {K}" in message and "not what was published" in message


def test_q_and_k_exchanged(bench: Bench) -> None:
    engine, weights = asleep(bench), bench.publish()
    edit(weights, lambda tensors: tensors.update({Q: tensors[K], K: tensors[Q]}))
    refused(engine, weights, "canary")  # the same bytes have the same sum: the fingerprint cannot detect it


def test_tied_head_left_stale(bench: Bench) -> None:
    """What vLLM's CPU build 0.32 does by itself; once it no longer does, delete the worker's repair."""
    engine = bench.engine()
    engine.acquire(bench.publish())
    bench.rpc("sabotage", keep_stale_head=True)
    engine.release()
    refused(engine, bench.publish(), "canary")


def test_prefix_cache_not_reset_across_a_push(bench: Bench, monkeypatch) -> None:
    engine = asleep(bench, level="0")  # at deeper levels vLLM itself drops its prefix cache
    monkeypatch.setattr(bench.backend, "reset_prefix_cache", lambda: True)
    assert "tokens would be served" in refused(engine, bench.publish(), "prefix cache")


def test_without_the_prefix_check_a_stale_prefix_would_go_unseen(bench: Bench, monkeypatch) -> None:
    engine = asleep(bench, level="0")
    monkeypatch.setattr(bench.backend, "reset_prefix_cache", lambda: True)
    monkeypatch.setattr(proof, "check_prefix_cache", lambda weights, cached: None)
    engine.acquire(bench.publish())
    assert bench.backend.count_cached_tokens(bench.canary) > 0


def test_verify_off_lets_everything_pass_and_says_so(bench: Bench, monkeypatch) -> None:
    engine = bench.engine(verify="off")
    old, new, reload = bench.publish(), bench.publish(), bench.backend.reload
    monkeypatch.setattr(bench.backend, "reload", lambda path: reload(old.path))
    engine.acquire(new)
    assert engine.metrics()["switch/verified"] == 0.0


def test_a_parameter_that_the_engine_keeps_in_float32_is_what_was_published() -> None:
    from rlswitch.engines.vllm.worker import live_fingerprint

    model = torch.nn.Module()
    values = {"a": torch.randn(8, 8).bfloat16(), "b": torch.randn(8).bfloat16()}
    model.a = torch.nn.Parameter(values["a"])
    model.b = torch.nn.Parameter(values["b"].float())
    published = total_fingerprint(named_fingerprints(values.items()).values())
    assert live_fingerprint(model, torch.bfloat16) == published
    model.b.data[0] += 1
    assert live_fingerprint(model, torch.bfloat16) != published
