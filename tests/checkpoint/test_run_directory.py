"""A run directory has one owner, enough disk space, and only whole lines in its files."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlswitch.checkpoint import run_directory
from rlswitch.checkpoint.run_directory import (
    LOCK,
    check_disk_space,
    checkpoint_size,
    only_run_in,
    room_needed,
)
from rlswitch.command import cli
from rlswitch.errors import ConfigError
from rlswitch.planning.footprint import ModelShape
from rlswitch.processes.signals import StopSignals
from rlswitch.records.jsonl import LineFile

HOLD = """
import sys
from pathlib import Path
from rlswitch.checkpoint.run_directory import only_run_in
with only_run_in(Path(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other_run(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Another process that owns tmp_path/run."""
    words = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


# -- one owner ---------------------------------------------------------------------------------


@pytest.mark.processes
def test_a_second_run_in_a_directory_is_told_who_has_it(other_run: subprocess.Popen, tmp_path: Path):
    who = f"a run with pid {other_run.pid} on host {socket.gethostname()} is using it"
    with pytest.raises(ConfigError, match=who), only_run_in(tmp_path / "run", print):
        pytest.fail("two runs")
    assert (tmp_path / "run" / LOCK).exists()


@pytest.mark.processes
def test_the_directory_of_a_killed_run_is_taken_over_without_a_word(other_run, tmp_path: Path):
    other_run.send_signal(signal.SIGKILL)
    other_run.wait()
    with only_run_in(tmp_path / "run", pytest.fail):
        owner = json.loads((tmp_path / "run" / LOCK).read_text())
        assert owner == {"pid": os.getpid(), "host": socket.gethostname()}


def test_the_directory_is_free_again_when_a_run_has_ended(tmp_path: Path):
    for _ in range(2):
        with only_run_in(tmp_path / "run", print):
            (tmp_path / "run" / "metrics.jsonl").touch()


def test_a_run_that_is_refused_before_it_made_anything_leaves_no_directory(tmp_path: Path):
    with pytest.raises(ConfigError, match="resume"), only_run_in(tmp_path / "run", print):
        raise ConfigError("resume = /nowhere: there is no such directory")
    assert not list(tmp_path.iterdir())


def test_no_program_that_a_run_starts_inherits_its_lock(tmp_path: Path):
    code = (
        "import os; print(*(os.path.realpath(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd')))"
    )
    with only_run_in(tmp_path / "run", print):
        (tmp_path / "run" / "metrics.jsonl").touch()
        done = subprocess.run([sys.executable, "-c", code], close_fds=False, capture_output=True, text=True)
    assert str(tmp_path / "run" / LOCK) not in done.stdout and done.stdout


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        match = rf"output_dir = {directory}: cannot be written to"
        with pytest.raises(ConfigError, match=match), only_run_in(directory, print):
            pytest.fail("held")


def test_a_file_system_without_locks_is_said_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unsupported(*_) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", unsupported)
    said: list[str] = []
    with only_run_in(tmp_path / "run", said.append):
        pass
    assert len(said) == 1 and "no second run" in said[0]


# -- disk space --------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
@pytest.mark.parametrize("settings", [{}, {"model": {"lora_rank": 4}, "checkpoint": {"merged": True}}])
def test_a_checkpoint_is_as_large_as_was_said_before_the_run(
    make_run, make_trainer, make_groups, tiny_model, tmp_path, algorithm: str, settings: dict
):
    from rlswitch.checkpoint.checkpoint import save
    from rlswitch.checkpoint.resume import LoopState

    run = make_run(algorithm, options={"kl_coef": 0.1, "reference_refresh": 1}, **settings)
    trainer = make_trainer(run)
    batch = trainer.prepare(make_groups())
    batch.advantages, batch.returns = run.algorithm.estimate_advantages(batch, trainer.memory)
    trainer.update(batch)
    path = save(tmp_path / "c", trainer, tiny_model().tokenizer, LoopState(step=1), keep=1)
    saved = sum(file.stat().st_size for file in path.rglob("*.safetensors"))
    assert checkpoint_size(run, ModelShape.read(run.model), 4) == pytest.approx(saved, rel=0.25)


def test_room_is_asked_for_the_checkpoints_to_keep_and_the_one_being_written(make_run):
    run = make_run(num_steps=100, checkpoint={"every": 10, "keep": 2})
    assert room_needed(run, 5, first_step=0, kept=0) == 15
    assert room_needed(run, 5, first_step=50, kept=2) == 5
    assert room_needed(run, 5, first_step=90, kept=0) == 5
    run.checkpoint.every = 0
    assert room_needed(run, 5, first_step=0, kept=0) == 5


def test_a_disk_without_room_is_refused_with_both_sizes(make_run, tmp_path, monkeypatch):
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    run = make_run()
    check_disk_space(run, tmp_path, 1000, 0)
    for need, published in ((free + 10**12, 0), (0, free + 10**12)):
        with pytest.raises(ConfigError, match=r"GB free, checkpoints need .* more.*checkpoint\.keep"):
            check_disk_space(run, tmp_path, need, published)
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(run_directory.os, "access", lambda *_: False)  # root can write anywhere
    with pytest.raises(ConfigError, match="checkpoints/ cannot be written to"):
        check_disk_space(run, tmp_path, 0, 0)


def test_a_disk_that_fills_up_during_the_run_ends_it_with_a_line(capsys):
    def train() -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")

    assert cli.guarded(train) == 1
    said = capsys.readouterr().err
    assert said.startswith("rlswitch: error: ") and "No space left" in said and said.count("\n") == 1


@pytest.fixture
def started(make_run, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Opens a session, which must fail before it reaches the engine."""
    from rlswitch import build

    monkeypatch.setattr(build, "inspect_models", lambda run, *_: SimpleNamespace(path=run.model.path))

    def start() -> None:
        run = make_run()
        with build.open_session(run, SimpleNamespace(prompts=None), StopSignals()):
            pytest.fail("it was started")

    return start


def test_a_run_without_room_is_refused_and_leaves_no_directory(started, tmp_path, monkeypatch):
    monkeypatch.setattr(run_directory.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match=r"output_dir = .*: 0\.00 MB free, checkpoints need"):
        started()
    assert not (tmp_path / "run").exists()


@pytest.mark.processes
def test_a_session_holds_its_directory(started, tmp_path, other_run):
    with pytest.raises(ConfigError, match=f"a run with pid {other_run.pid}"):
        started()


def test_a_session_with_damaged_checkpoints_only_is_not_started(started, tmp_path):
    (tmp_path / "run" / "checkpoints" / "step_000001").mkdir(parents=True)
    with pytest.raises(ConfigError, match="none of the 1 checkpoints"):
        started()


# -- whole lines -------------------------------------------------------------------------------


def test_a_record_that_does_not_fit_on_the_disk_leaves_no_torn_line(tmp_path, monkeypatch):
    path, write = tmp_path / "metrics.jsonl", os.write
    lines = LineFile(path)
    lines.append([{"step": 1}])

    def short(handle: int, data: memoryview) -> int:
        if len(data) <= 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", short)
    with pytest.raises(OSError, match="No space"):
        lines.append([{"step": 2, "reward/mean": 0.5}])
    monkeypatch.undo()
    assert path.read_text() == '{"step": 1}\n'
    lines.append([{"step": 2}])
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
