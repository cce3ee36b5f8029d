"""Frozen engines on the real vLLM: they reload their own checkpoint, and the reload is proven."""

from pathlib import Path

import pytest
import torch
from bench import Bench
from safetensors.torch import load_file, save_file

from rlswitch.engines.engine import Engine
from rlswitch.engines.start import engine_on
from rlswitch.errors import ProofError, SwitchError
from rlswitch.serving.serve import frozen_spec
from rlswitch.switch.switch import Switch
from rlswitch.types import Prompt, Sampling

pytestmark = pytest.mark.engine

PROMPTS = [Prompt(index=i, messages="1+2=", token_ids=[13, 1, 10, 2 + i, 11]) for i in range(3)]
SAMPLING = Sampling(num_samples=2, max_new_tokens=12, temperature=0.7, seed=0, step=1)


def start(bench: Bench, path: Path, level: str) -> Engine:
    """A frozen engine on the shared backend, which loads `path` as if started with it."""
    backend = bench.backend
    for tag in ("weights", "kv_cache"):
        backend.wake(tag)
    backend.reload(path)
    backend.reset_prefix_cache()
    spec = frozen_spec(str(path), level=level, dtype="float32", max_model_len=128)
    return engine_on(backend, spec, bench.tokenizer, bench.ledger, frozen=True)


@pytest.fixture
def checkpoint(bench: Bench, tmp_path: Path) -> Path:
    """A checkpoint that the test may edit."""
    bench.model.save_pretrained(tmp_path / "judge")
    bench.tokenizer.save_pretrained(tmp_path / "judge")
    return tmp_path / "judge"


def edit(path: Path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path / "model.safetensors")


def samples_of(engine: Engine) -> list:
    groups = engine.generate(PROMPTS, SAMPLING)
    return [(r.token_ids, r.logprobs) for group in groups for r in group.rollouts]


@pytest.mark.parametrize("level", ["0", "kv", "1", "2"])
def test_it_comes_back_by_itself_with_the_same_outputs_and_proven(bench, checkpoint, level: str) -> None:
    engine = start(bench, checkpoint, level)
    before, switch = samples_of(engine), Switch(bench.ledger, holder=engine)
    for _ in range(2):
        switch.vacate()
        switch.give_to(engine)
        assert engine.proven and engine.version == 0
        assert samples_of(engine) == before


def test_a_checkpoint_may_differ_in_dtype_and_hold_a_tied_head_of_its_own(bench, checkpoint) -> None:
    def as_published_on_a_hub(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit(checkpoint, as_published_on_a_hub)
    engine = start(bench, checkpoint, "2")
    engine.release()
    engine.acquire(None)
    assert engine.proven


def test_a_checkpoint_that_changes_on_disk_is_not_served(bench, checkpoint) -> None:
    engine = start(bench, checkpoint, "2")
    engine.release()
    edit(checkpoint, lambda tensors: tensors["model.norm.weight"][0].add_(1e-6))
    with pytest.raises(ProofError, match=r"fingerprint.*model\.norm\.weight.*may have changed"):
        engine.acquire(None)


def test_a_reload_of_something_else_is_found_out(bench, checkpoint, monkeypatch) -> None:
    engine, reload, other = start(bench, checkpoint, "2"), bench.backend.reload, bench.publish()
    engine.release()
    monkeypatch.setattr(bench.backend, "reload", lambda path: reload(other.path))
    with pytest.raises(ProofError, match="fingerprint"):
        engine.acquire(None)


def test_weights_that_changed_while_it_slept_at_level_1_are_found_out(bench, checkpoint) -> None:
    engine, other = start(bench, checkpoint, "1"), bench.publish(noise=0.1)
    engine.release()
    bench.backend.reload(other.path)
    with pytest.raises(ProofError, match="canary"):
        engine.acquire(None)


def test_stale_prefixes_are_found_out(bench, checkpoint, monkeypatch) -> None:
    engine = start(bench, checkpoint, "0")
    engine.backend.count_cached_tokens(engine.base_weights.canary.sequences)  # known already
    engine.release()
    monkeypatch.setattr(bench.backend, "reset_prefix_cache", lambda: True)
    with pytest.raises(ProofError, match="prefix cache"):
        engine.acquire(None)


def test_nothing_can_be_pushed_into_it(bench, checkpoint) -> None:
    engine = start(bench, checkpoint, "2")
    with pytest.raises(SwitchError, match=r"frozen at .*judge: call give_to without weights"):
        engine.acquire(bench.publish())
