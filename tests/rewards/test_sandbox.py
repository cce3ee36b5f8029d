"""Programs written by a model: stopped and named, with nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from samples import group_of

from rlswitch.config.sections import RewardConfig
from rlswitch.errors import ConfigError
from rlswitch.rewards.rewards import Rewards
from rlswitch.rewards.sandbox import sandbox as module
from rlswitch.rewards.sandbox.code import CodeReward, code_block
from rlswitch.rewards.sandbox.sandbox import Limits, Sandbox, SandboxError

pytestmark = pytest.mark.processes

LIMITS = Limits(seconds=1.0, memory_bytes=1 << 30, processes=32, file_bytes=1 << 20)
"""One second of CPU time, which can take a minute on a busy machine."""


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough time to use one second of CPU time on a busy machine."""
    monkeypatch.setattr(module, "PATIENCE", 60.0)


def isolation() -> str | None:
    try:
        Sandbox(replace(LIMITS, seconds=60.0))
    except SandboxError as error:
        return str(error)
    return None


MISSING = isolation()
needs_isolation = pytest.mark.skipif(MISSING is not None, reason=f"no isolation here: {MISSING}")


@pytest.fixture(params=["isolated", "limits only"])
def sandbox(request, monkeypatch, tmp_path: Path):
    """Each kind in turn; no test may leave a process or a file behind."""
    monkeypatch.setenv("SECRET", "do not tell")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = set(psutil.Process().children(recursive=True))  # a tracker's service, of another test
    if request.param == "isolated":
        if MISSING is not None:
            pytest.skip(f"no isolation here: {MISSING}")
        yield Sandbox(LIMITS)
    else:
        yield unsandboxed(monkeypatch)
    assert not set(psutil.Process().children(recursive=True)) - before
    assert not list(tmp_path.iterdir())


def command_of(process: psutil.Process) -> str:
    with suppress(psutil.Error):  # it may exit meanwhile
        return " ".join(process.cmdline())
    return ""


def unsandboxed(monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """Imitates a kernel without namespaces, which rejects everything isolated."""
    with monkeypatch.context() as patch:
        patch.setattr(Sandbox, "_spec", _impossible(Sandbox._spec))
        return Sandbox(LIMITS, allow_unsandboxed=True)


def _impossible(spec):
    def changed(self, *arguments):
        return spec(self, *arguments) | {"visible": ["/no-such-place-to-bind"]}

    return changed


SPENT_BY_A_CHILD = """
import os
if os.fork() == 0:
    while True: pass
os.wait()
os.kill(os.getpid(), 9)
"""


@needs_isolation
def test_a_program_gets_its_input_and_is_heard(sandbox):
    outcome = sandbox.run("import sys; print(input()); print('err', file=sys.stderr)", stdin="in\n")
    assert (outcome.problem, outcome.output, outcome.errors) == (None, "in\n", "err\n")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("while True: pass", "ran longer than 1 s"),
        ("import signal\nsignal.pthread_sigmask(0, range(1, 64))\nwhile True: pass", "ran longer than 1 s"),
        ("x = bytearray(1 << 34)", "exit code 1: MemoryError"),
        ("while True: print('x' * 9999)", "printed more than 1048576 bytes"),
        ("import os; os._exit(3)", "exit code 3"),
        ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
        ("import time\ntime.sleep(1000)", "did not end within 3 s"),
        (SPENT_BY_A_CHILD, "killed by SIGKILL"),
        ("open('big', 'wb').write(b'x' * (1 << 24))", "exit code 1: OSError: [Errno 27] File too large"),
        ("l = [open('main.py') for _ in range(99)]", "exit code 1: OSError: [Errno 24] Too many open files"),
        ("1 / 0", "exit code 1: ZeroDivisionError: division by zero"),
    ],
)
def test_what_a_program_does_wrong_is_named(sandbox, monkeypatch, source, problem):
    if problem.startswith("did not end"):
        monkeypatch.setattr(module, "PATIENCE", 3.0)
    assert (sandbox.run(source).problem or "").startswith(problem)


@pytest.fixture
def shared_core() -> Iterator[None]:
    """Pins this process and its children to one core, shared with a process that rarely runs at a tick."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    other = subprocess.Popen([sys.executable, "-S", "-c", NAPS])
    yield
    other.kill()
    other.wait()
    os.sched_setaffinity(0, cores)


NAPS = """
import time
while True:
    until = time.perf_counter() + 0.0006
    while time.perf_counter() < until: pass
    time.sleep(0.0005)
"""


def test_a_program_on_a_busy_core_is_judged_by_the_count_that_ended_it(sandbox, shared_core):
    """The kernel charges whole ticks, more than the program has computed."""
    assert sandbox.run("while True: pass").problem == "ran longer than 1 s"


ORPHANS = """
import os, signal, time
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64))
        for fd in range(3):
            os.close(fd)
        time.sleep(1000)
"""


@pytest.mark.parametrize("then", ["", "while True: pass"])
def test_processes_that_leave_their_session_are_ended(sandbox, tmp_path, then):
    sandbox.run(ORPHANS + then, argv=(str(tmp_path),))
    assert not [process for process in psutil.process_iter() if str(tmp_path) in command_of(process)]


def test_the_environment_tells_nothing(sandbox):
    outcome = sandbox.run("import os, json; print(json.dumps(dict(os.environ)))")
    assert set(json.loads(outcome.output)) == {*module.ENVIRONMENT, "TMPDIR"}


def test_no_descriptor_is_inherited(sandbox, tmp_path):
    with tempfile.TemporaryFile() as file:
        os.set_inheritable(file.fileno(), True)
        outcome = sandbox.run(LIST_DESCRIPTORS)
    assert json.loads(outcome.output) == [0, 1, 2]


LIST_DESCRIPTORS = """
import os
def is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
print([fd for fd in range(256) if is_open(fd)])
"""


@needs_isolation
@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import socket; socket.create_connection(('1.1.1.1', 80), 2)", "unreachable"),
        ("import os; os.kill(PARENT, 0)", "ProcessLookupError"),
        ("open('/proc/PARENT/environ').read()", "FileNotFoundError"),
        ("open('/etc/passwd')", "FileNotFoundError"),
        ("open('/usr/new', 'w')", "Read-only file system"),
        ("import os; os.mkdir('/new')", "Read-only file system"),
        ("import os\nwhile True: os.fork()", "BlockingIOError"),
        ("import os; os.setuid(0)", "PermissionError"),
        ("import os; os.chroot('/tmp')", "PermissionError"),
    ],
)
def test_an_isolated_program_reaches_nothing_outside(source, says):
    before = set(psutil.Process().children(recursive=True))
    if os.getuid() == 0 or "setuid" not in source:
        outcome = Sandbox(LIMITS).run(source.replace("PARENT", str(os.getpid())))
        # many processes may write at once: not only the last line
        assert outcome.problem and says in outcome.problem + outcome.errors
    assert not set(psutil.Process().children(recursive=True)) - before


@needs_isolation
def test_what_lives_below_tmp_can_be_shown_and_not_changed(monkeypatch):
    """As if the interpreter's environment were there."""
    library = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        (library / "module.py").write_text("known = 7")
        library.chmod(0o755)
        paths = [*module.interpreter_paths(), str(library)]
        monkeypatch.setattr(module, "interpreter_paths", lambda: paths)
        source = f"import sys, os; sys.path.append('{library}'); import module; print(module.known)\n"
        assert Sandbox(LIMITS).run(source).output == "7\n"
        changing = Sandbox(LIMITS).run(f"open('{library}/module.py', 'w')")
        assert changing.problem and "Read-only file system" in changing.problem
        free = Sandbox(LIMITS).run("open('/tmp/mine', 'w').write('x'); print(open('/tmp/mine').read())")
        assert free.output == "x\n"
    finally:
        shutil.rmtree(library)


@needs_isolation
def test_an_isolated_program_may_use_the_packages_and_a_directory_of_its_own():
    source = "import numpy, os; open('/tmp/x', 'w').write('y'); print(numpy.ones(2).sum(), os.listdir('.'))"
    outcome = Sandbox(replace(LIMITS, seconds=30.0)).run(source)
    assert outcome.problem is None and outcome.output.startswith("2.0 [") and "'x'" in outcome.output


def test_without_isolation_nothing_runs_unless_told(monkeypatch):
    monkeypatch.setattr(Sandbox, "_spec", _impossible(Sandbox._spec))
    with pytest.raises(SandboxError, match="the sandbox could not be set up"):
        Sandbox(LIMITS)
    assert Sandbox(LIMITS, allow_unsandboxed=True).missing


# ---- the reward


def code(*lines: str) -> str:
    return "Here:\n```python\n" + "\n".join(lines) + "\n```\ndone"


ADD = code("def add(a, b):", "    return a + b")
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0", "assert add(2, 2) == 5"]


@needs_isolation
@pytest.mark.parametrize(
    ("completion", "score", "remark"),
    [
        (ADD, 2 / 3, "passed 2 of 3"),
        ("def add(a, b): return a + b", 2 / 3, "passed 2 of 3"),
        (code("def add(a, b):", "    return 3"), 1 / 3, "passed 1 of 3"),
        (code("import sys", "sys.exit(0)"), 0.0, "passed 0 of 3"),
        (code("import os", "os._exit(0)"), 0.0, "passed 0 of 3"),
        (code("print('0'); print('1'); print('2')", "def add(a, b): ..."), 0.0, "passed 0 of 3"),
        (code("print(open('/tmp/stdin').read())"), 0.0, "FileNotFoundError"),
        (code("import sys; print(sys.stdin.read()[0])"), 0.0, "IndexError"),
        (code("def add(a, b):", "    while a == 2: pass", "    return a + b"), 2 / 3, "ran longer than 1 s"),
        (code("x = bytearray(1 << 34)"), 0.0, "MemoryError"),
        (code("this is no Python"), 0.0, "SyntaxError"),
    ],
)
def test_code_is_worth_the_share_of_the_tests_it_passes(completion, score, remark):
    said = {}
    reward = CodeReward(Sandbox(LIMITS))
    scores = reward([None], [completion], [TESTS], log_extra=lambda name, values: said.update({name: values}))
    assert scores == [pytest.approx(score)]
    assert remark in said["code"][0]


PATIENT = """
from rlswitch.rewards.sandbox import sandbox
sandbox.PATIENCE = 60.0
def nothing(prompts, **columns): return [None] * len(prompts)
"""
"""Imported by a worker: its programs may wait for a busy machine."""


@needs_isolation
def test_the_code_reward_of_a_run_names_its_outcomes(tmp_path, request):
    (tmp_path / "patient.py").write_text(PATIENT)
    functions = [f"{tmp_path / 'patient.py'}:nothing", "code"]
    rewards = Rewards(RewardConfig(functions=functions, timeout_s=600.0, workers=2))
    request.addfinalizer(rewards.close)
    crash = code("import os; os.kill(os.getpid(), 11)")
    group = group_of(ADD, crash, ADD, tests=TESTS[:2])
    rewards.score([group], None)
    assert [rollout.reward for rollout in group.rollouts] == [1.0, 0.0, 1.0]
    remarks = [rollout.extra["code"] for rollout in group.rollouts]
    assert remarks == ["passed 2 of 2", "passed 0 of 2; killed by SIGSEGV", "passed 2 of 2"]
    assert not group.failed


def test_the_code_reward_refuses_to_run_without_isolation(monkeypatch):
    from rlswitch.rewards.workers.resolve import make_code

    monkeypatch.setattr(Sandbox, "_spec", _impossible(Sandbox._spec))
    with pytest.raises(ConfigError, match=r"reward\.allow_unsandboxed=true"):
        make_code(RewardConfig(timeout_s=9.0))


@needs_isolation
@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else for each program")
def test_programs_side_by_side_do_not_share_one_limit_on_processes():
    source = (
        "import threading, time\n"
        "many = [threading.Thread(target=time.sleep, args=(1,)) for _ in range(20)]\n"
        "for one in many: one.start()\n"
        "print('started')\n"
    )
    sandbox = Sandbox(replace(LIMITS, seconds=5.0, memory_bytes=4 << 30))  # each thread reserves some
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda _: sandbox.run(source), range(4)))
    assert [outcome.output.strip() for outcome in outcomes] == ["started"] * 4


@needs_isolation
def test_tests_may_be_a_list_written_as_json():
    reward = CodeReward(Sandbox(LIMITS))
    wrong = code("def add(a, b):", "    return 3")
    scores = reward([None] * 3, [ADD, wrong, ADD], [json.dumps(TESTS[:2])] * 2 + ['{"inputs": [1]}'])
    assert scores[:2] == [1.0, 0.5] and isinstance(scores[2], ValueError)
    assert reward([None], [ADD], ["[]"]) == [None]


def test_the_last_fenced_block_is_the_code():
    assert code_block("```python3\nx = 1\n```") == "x = 1\n"
    assert code_block("```python\r\nx = 1\r\n```") == "x = 1\r\n"
    assert code_block("a\n```py\nx\n```\nb\n```\ny = 1\n```\n") == "y = 1\n"
    assert code_block("y = 1") == "y = 1"
