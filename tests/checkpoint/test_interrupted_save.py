"""A save interrupted at any system call leaves the previous checkpoint or the complete new one."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from syscalls import Call, run_watched

from rlswitch.checkpoint import resume
from rlswitch.checkpoint.atomic import MANIFEST, checkpoint_problems
from rlswitch.checkpoint.checkpoint import save
from rlswitch.checkpoint.resume import LoopState
from rlswitch.errors import SaveError
from rlswitch.run import Run

pytestmark = [
    pytest.mark.processes,
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

OLD, NEW = {"step": 1, "cursor": 1}, {"step": 2, "cursor": 2}
AGAIN = {"step": 1, "cursor": 2}
"""Saves the same step again, which replaces its directory; NEW writes a new one and prunes the old."""

SAID = 42


class Saves(NamedTuple):
    """A run with one checkpoint that a test can save repeatedly."""

    run: Run
    directory: Path
    """The run directory, with the checkpoint OLD."""
    save: Callable[[dict[str, int]], Path]

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def content(self) -> dict[str, bytes]:
        """The bytes that a run started now would resume from."""
        path, *_ = resume.choose(self.run, self.directory, print)
        assert path is not None
        files = (file for file in path.rglob("*") if file.is_file())
        return {str(file.relative_to(self.checkpoints)): file.read_bytes() for file in files}

    def names(self) -> list[str]:
        return sorted(path.name for path in self.checkpoints.iterdir())


@pytest.fixture
def saves(tmp_path: Path, make_run, make_trainer, tiny_model) -> Saves:
    run = make_run("grpo")
    trainer, tokenizer = make_trainer(run), tiny_model().tokenizer
    directory = tmp_path / "saves"

    def save_as(state: dict[str, int]) -> Path:
        kept = LoopState(model=run.model.path, **state)
        return save(directory / "checkpoints", trainer, tokenizer, kept, keep=1)

    save_as(OLD)
    return Saves(run, directory, save_as)


@pytest.fixture
def calls_of(saves: Saves) -> Callable[..., list[Call]]:
    """calls_of(NEW): the system calls of an undisturbed save, in order."""
    try:
        run_watched(lambda: None, saves.directory)
    except OSError as error:
        pytest.skip(f"this kernel does not let us watch a process: {error}")

    def watch(state: dict[str, int]) -> list[Call]:
        ended = run_watched(partial(saves.save, state), saves.directory)
        assert ended.code == 0
        return ended.calls

    return watch


def attempt(saves: Saves, state: dict[str, int]) -> None:
    """Runs in a fork; exits with SAID if the save reports a failure."""
    try:
        saves.save(state)
    except SaveError:
        os._exit(SAID)


@pytest.mark.parametrize("state", [NEW, AGAIN], ids=["new", "again"])
@pytest.mark.parametrize("how", ["kill_at", "full_from"])
def test_a_save_broken_off_anywhere_leaves_the_old_checkpoint_or_the_new_one(
    saves: Saves, calls_of, tmp_path: Path, state: dict[str, int], how: str
):
    before, kept = saves.content(), tmp_path / "kept"
    shutil.copytree(saves.checkpoints, kept)
    calls = calls_of(state)
    after, names = saves.content(), saves.names()
    assert after != before and len(calls) > 40
    left = set()
    for number, call in enumerate(calls):
        shutil.rmtree(saves.checkpoints)
        shutil.copytree(kept, saves.checkpoints)
        ended = run_watched(partial(attempt, saves, state), saves.directory, **{how: number})
        assert len(ended.calls) > number, call
        assert ended.code == -signal.SIGKILL if how == "kill_at" else ended.code in (0, SAID), call
        if ended.code == SAID:  # a failed save cleans up; a killed one cannot
            assert not [name for name in saves.names() if name.startswith(".")], call
        found = saves.content()
        assert found in (before, after), call
        left.add(found == after)
        saves.save(state)
        assert saves.names() == names and saves.content() == after, call
    assert left == {True, False}


@pytest.mark.parametrize("state", [NEW, AGAIN], ids=["new", "again"])
def test_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_the_old_one_goes_last(
    saves: Saves, calls_of, state: dict[str, int]
):
    calls = calls_of(state)
    final = saves.checkpoints / f"step_{state['step']:06d}"
    draft = saves.checkpoints / f".{final.name}.tmp"
    named = calls.index(Call("rename", draft, final))
    written, pending = set(), set()
    for name, path, target in calls[:named]:
        if name == "write":
            written.add(path)
            pending.add(path)
        elif name == "rename" and target is not None:  # safetensors writes a temporary file itself
            for found in (written, pending):
                if path in found:
                    found.remove(path)
                    found.add(target)
        elif name == "fsync":
            pending.discard(path)
    assert {path.name for path in written} >= {MANIFEST, "model.safetensors", "optimizer.safetensors"}
    assert not pending
    opened = [call.path for call in calls if call.name == "open"]
    assert opened[-1] == draft / MANIFEST
    for directory in {draft, *(path.parent for path in written)}:
        assert Call("fsync", directory) in calls[:named]
    durable = named + calls[named:].index(Call("fsync", saves.checkpoints))
    removed = [i for i, call in enumerate(calls) if call.name == "remove"]
    assert removed and min(removed) > durable
    assert not any(checkpoint_problems(final))
