"""Processes forked from the server that has imported vLLM, and what they inherit."""

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

from rlswitch.processes.driver import NOT_INITIALIZED, ask_fork
from rlswitch.processes.fork_server import serving_vllm, socket_directory, start_process

pytestmark = pytest.mark.engine


def describe(file: str, depth: int) -> None:
    """Records the state of this process and of a child; exits with code 7."""
    facts = {
        "imported": "vllm.v1.engine.core" in sys.modules,
        "variable": os.environ.get("RLSWITCH_TEST"),
        "server": os.getppid(),
        "group": os.getpgrp(),
        "session": os.getsid(0),
        "temporary": tempfile.gettempdir(),
        "parent": multiprocessing.parent_process().pid,
    }
    print("said by", depth)
    if depth:
        child = multiprocessing.get_context("spawn").Process(target=describe, args=(file + "+", depth - 1))
        child.start()
        child.join()
        facts["child"] = json.loads(Path(file + "+").read_text()) | {"code": child.exitcode}
    Path(file).write_text(json.dumps(facts))
    sys.exit(7)


def test_a_process_and_its_children_come_from_one_server_with_what_they_were_given(tmp_path: Path) -> None:
    environment = os.environ | {"RLSWITCH_TEST": "given", "TMPDIR": str(tmp_path)}
    file, log = tmp_path / "facts", tmp_path / "log"
    with open(log, "w") as output:
        outputs = (output.fileno(), output.fileno())
        process = start_process(describe, [str(file), 1], environment=environment, outputs=outputs)
        process.join(600)
    assert process.exitcode == 7
    facts = json.loads(file.read_text())
    child = facts.pop("child")
    assert child.pop("code") == 7
    for found in (facts, child):
        assert found["imported"] and found["variable"] == "given" and found["temporary"] == str(tmp_path)
        assert found["session"] == os.getsid(0), "or the cores would be shared out between sessions"
        assert found["group"] != os.getpgrp(), "or a terminal's Ctrl-C would reach it"
    assert facts["server"] == child["server"] != os.getpid()
    assert facts["parent"] == os.getpid() and child["parent"] == process.pid
    assert sorted(log.read_text().splitlines()) == ["said by 0", "said by 1"]


def test_a_cold_process_is_given_the_same(tmp_path: Path) -> None:
    file = tmp_path / "facts"
    environment = os.environ | {"RLSWITCH_TEST": "given"}
    process = start_process(describe, [str(file), 0], environment=environment, warm=False)
    process.join(600)
    facts = json.loads(file.read_text())
    assert process.exitcode == 7 and facts["server"] == os.getpid() and not facts["imported"]
    assert facts["variable"] == "given" and facts["group"] != os.getpgrp()


def test_a_signal_that_ends_a_process_is_its_exit_code() -> None:
    process = start_process(signal.pause, [])
    os.kill(process.pid, signal.SIGKILL)
    process.join(600)
    assert process.exitcode == -signal.SIGKILL


def test_nothing_that_the_server_imports_initialises_cuda() -> None:
    assert ask_fork() == NOT_INITIALIZED


def test_only_vllms_own_start_is_redirected() -> None:
    plain = multiprocessing.get_context("spawn")
    with serving_vllm(warm=True):
        assert multiprocessing.get_context("spawn") is not plain
        assert multiprocessing.get_context("fork").get_start_method() == "fork"
    with serving_vllm(warm=False):
        assert multiprocessing.get_context("spawn") is plain
    assert multiprocessing.get_context("spawn") is plain


def leave_a_file(path: str, orphaned: bool) -> None:
    """With `orphaned`, first kills its server and starts a process from a new one."""
    if orphaned:
        server = os.getppid()
        os.kill(server, signal.SIGKILL)
        while os.getppid() == server:
            time.sleep(0.01)
        others = socket_directory()
        start_process(leave_a_file, [path, False]).join()
        assert others != socket_directory(), "what others use would be removed with us"
        Path(path).write_text(Path(path).read_text() + " by another")
    else:
        Path(path).write_text("started")


def test_a_process_outlives_its_server_and_starts_another(tmp_path: Path) -> None:
    path = tmp_path / "file"
    process = start_process(leave_a_file, [str(path), True])
    process.join()  # waits for the process, although its server can no longer report it
    assert path.read_text() == "started by another"
    after = start_process(leave_a_file, [str(path), False])
    after.join()
    assert (after.exitcode, path.read_text()) == (0, "started")
