"""What only the server engine does: attach to a running server, and fail to start in a separate process."""

import stat
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from bench import Bench, open_bench

from rlswitch.engines.revival import RestartingEngine
from rlswitch.engines.spec import EngineSpec, Launch
from rlswitch.engines.vllm.server import ServerBackend, check_server
from rlswitch.errors import ConfigError, EngineError, EngineLost
from rlswitch.types import Prompt, Sampling

pytestmark = [pytest.mark.engine, pytest.mark.parametrize("bench", ["server"], indirect=True)]

PROMPTS = [Prompt(index=i, messages="1+2=", token_ids=[13, 1, 10, 2, 11]) for i in range(4)]
SAMPLING = Sampling(num_samples=3, max_new_tokens=12, temperature=0.7, seed=0, step=1)


def attaching(bench: Bench) -> EngineSpec:
    """The bench's engine, attached through its server's URL."""
    settings = replace(bench.spec.settings, url=str(bench.backend.client.address))
    return replace(bench.spec, settings=settings)


def attach(bench: Bench, tmp_path: Path) -> Bench:
    launch = Launch(
        spec=attaching(bench),
        tokenizer=bench.tokenizer,
        device=bench.ledger.device,
        log_path=tmp_path / "engine.log",
        scratch=bench.publisher.root,
    )
    return replace(bench, backend=ServerBackend(launch), spec=launch.spec)


def test_only_we_reach_the_socket(bench: Bench) -> None:
    socket = Path(bench.backend.client.address.socket)
    assert socket.is_socket() and stat.S_IMODE(socket.parent.stat().st_mode) == 0o700


def test_an_attached_server_serves_one_run_after_the_other_and_lives_on(bench: Bench, tmp_path) -> None:
    for _ in range(2):  # the second finds it asleep at level 2, as the first left it
        attached = attach(bench, tmp_path)
        with pytest.raises(ConfigError, match="another run is attached"):
            attach(bench, tmp_path)
        attached.backend.sleep("2")
        engine = attached.engine()
        weights = attached.publish()
        engine.acquire(weights)
        groups = engine.generate(PROMPTS, SAMPLING)
        assert engine.proven and groups[0].rollouts[0].policy_version == weights.version
        engine.release()
        assert engine.unreleased() is None
        engine.close()
        bench.versions = attached.versions
    assert all(process.is_running() for process in bench.backend.family.processes)


def test_what_a_server_says_that_was_started_again_meanwhile_is_not_taken(bench: Bench, tmp_path) -> None:
    attached = attach(bench, tmp_path)
    attached.backend.sleep("2")
    engine = attached.engine()
    engine.acquire(attached.publish())
    expected = [it.token_ids for group in engine.generate(PROMPTS, SAMPLING) for it in group.rollouts]
    attached.rpc("restart")
    with pytest.raises(EngineLost, match="is not the server that was pushed to"):
        engine.generate(PROMPTS, SAMPLING)
    engine.close()
    said: list[str] = []
    engine = RestartingEngine(
        attach(bench, tmp_path).engine(), lambda: attach(bench, tmp_path).backend, limit=1, log=said.append
    )
    engine.backend.sleep("2")
    engine.acquire(attached.publish(noise=0.0))
    engine.backend.collective_rpc("restart")
    groups = engine.generate(PROMPTS, SAMPLING)
    assert [it.token_ids for group in groups for it in group.rollouts] == expected
    assert (engine.restarts, len(said)) == (1, 1)
    engine.release()
    engine.close()
    bench.versions = attached.versions


def test_a_server_is_asked_for_all_that_a_run_needs(bench: Bench) -> None:
    spec = attaching(bench)
    check_server(spec, spec.model_path)
    other = replace(spec, model_path="/another/model", dtype="bfloat16", max_model_len=4096)
    with pytest.raises(ConfigError) as error:
        check_server(other, "/another/model")
    (line,) = error.value.problems
    for part in ("this run needs /another/model", "dtype is float32", "max_model_len is 128", "--uds="):
        assert part in line


def test_a_server_that_does_not_tell_cached_tokens_is_refused(bench: Bench, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(ServerBackend, "count_cached_tokens", lambda self, sequences: 0)
    with pytest.raises(EngineError, match="--enable-prompt-tokens-details"):
        attach(bench, tmp_path)
    bench.backend.sleep("2")  # as it was before


def test_a_failed_start_says_why_and_leaves_nothing(bench: Bench, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(EngineError) as error, open_bench(tmp_path, "server", vllm={"no_such_flag": 1}):
        pass
    first, *rest = str(error.value).splitlines()
    assert "vLLM's server did not start" in first and "--no-such-flag" in first and rest
    assert not list(tmp_path.glob("rlswitch-socket-*"))
