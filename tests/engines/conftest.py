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
    """A separate engine, for a test that breaks it."""
    with open_bench(tmp_path) as bench:
        yield bench


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """The shared engine, asleep before and after every test.

    The local one by default; otherwise parametrize("bench", [...], indirect=True).
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

    Runs like the jobs of a sweep: all tests share one import of the libraries.
    """

    def run(*words: str, cwd: Path | None = None, check: bool = True) -> Finished:
        finished = finish(train, ["logger=[]", *words], cwd or tmp_path_factory.mktemp("cwd"))
        if check:
            assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
        return finished

    return run
