"""Fixtures for tests with the real vLLM. They share an engine: starting one takes longer than most tests."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # the engine's processes inherit our sys.path

from bench import Bench, open_bench
from runs import Finished, finish, train

if torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]  # these tests need the CPU worker


@pytest.fixture(scope="session")
def shared_local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with open_bench(tmp_path_factory.mktemp("local"), "local") as bench:
        yield bench


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with open_bench(tmp_path_factory.mktemp("server"), "server") as bench:
        yield bench


@pytest.fixture
def disposable_bench(tmp_path: Path) -> Iterator[Bench]:
    """An engine of its own, for a test that ruins it."""
    with open_bench(tmp_path) as bench:
        yield bench


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """The shared engine, asleep before and after every test whatever the test did to it.

    The local one, unless a test asks for another: parametrize("bench", [...], indirect=True).
    """
    bench: Bench = request.getfixturevalue(f"shared_{getattr(request, 'param', 'local')}")
    yield bench
    bench.rpc("sabotage", keep_stale_head=False)
    for tag in ("weights", "kv_cache"):
        bench.backend.wake(tag)
    bench.backend.reset_prefix_cache()
    bench.backend.sleep("2")


@pytest.fixture(scope="session")
def run_train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Finished]:
    """run_train("recipe=ppo", ...): train.py's main in a separate process, and its outcome.

    As the jobs of a sweep are run: the libraries are imported once for all tests.
    """

    def run(*words: str, cwd: Path | None = None, check: bool = True) -> Finished:
        finished = finish(train, ["logger=[]", *words], cwd or tmp_path_factory.mktemp("cwd"))
        if check:
            assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
        return finished

    return run
