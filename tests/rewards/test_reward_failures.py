"""Failing reward functions: each is stopped and named, the other rows are kept, nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from samples import group_of

from rlswitch.config.sections import RewardConfig
from rlswitch.errors import RewardError
from rlswitch.records.monitor import rollout_records
from rlswitch.rewards.metrics import reward_metrics
from rlswitch.rewards.rewards import Rewards
from rlswitch.types import Group, Rollout

pytestmark = pytest.mark.processes

ROWS = 20


def step(*odd: int, rows: int = ROWS) -> list[Group]:
    """Groups of four; completions at the positions `odd` are "odd", the others "fine"."""
    texts = ["odd" if place in odd else "fine" for place in range(rows)]
    return [
        group_of(*texts[4 * index : 4 * index + 4], index=index, messages=f"prompt {index}")
        for index in range(rows // 4)
    ]


@pytest.fixture
def rewards(tmp_path: Path):
    """rewards(body, **settings): a function that does `body` when it meets an odd completion."""
    made: list[Rewards] = []

    def build(body: str, before: str = "", kind: str = "def", **options) -> Rewards:
        lines = body.replace("\n", "\n        ")
        file = tmp_path / f"mine{len(made)}.py"
        file.write_text(
            "import asyncio, os, signal, sys, time\n"
            f"{before}\n{kind} bad(prompts, completions, **columns):\n"
            f"    if 'odd' in completions:\n        {lines}\n    return [1.0] * len(prompts)\n"
        )
        options = {"timeout_s": 60.0, **options}
        functions = options.pop("functions", ["length"])
        step_size = options.pop("step_size", 0)
        config = RewardConfig(functions=[*functions, f"{file}:bad"], **options)
        made.append(Rewards(config, step_size=step_size))
        made[-1].log = said.append
        return made[-1]

    said: list[str] = []
    build.said = said
    yield build
    for one in made:
        one.close()
    me = psutil.Process()
    for child in me.children(recursive=True):
        with suppress(psutil.Error):  # it may exit meanwhile
            assert "supervisor.py" not in " ".join(child.cmdline())


def names_of(rollouts: list[Rollout]) -> list[tuple[int, int]]:
    return [(rollout.prompt.index, rollout.sample) for rollout in rollouts]


CRIMES = {
    "raises": ("raise ValueError('no')", "raised ValueError: no (at mine0.py:5)"),
    "exits": ("sys.exit(3)", "raised SystemExit: 3"),
    "ends its process": ("os._exit(3)", "ended its process with exit code 3"),
    "crashes": ("os.kill(os.getpid(), signal.SIGSEGV)", "ended its process by SIGSEGV"),
    "loops": ("while True: pass", "took longer than 2 s"),
    "waits where no exception reaches it": (
        "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\nwhile True: time.sleep(1)",
        "took longer than 2 s",
    ),
    "eats memory": ("x = [bytearray(1 << 20) for _ in range(1 << 20)]", "raised MemoryError"),
    "prints a gigabyte": ("for _ in range(1024): print('x' * (1 << 20))", "printed more than 1048576 bytes"),
    "forks and lets the child return": ("if os.fork(): os.wait(); raise OSError('parent')", "parent"),
    "returns nothing": ("return None", "returned None instead of a list of 1 numbers"),
    "returns too few": ("return [1.0] * (len(prompts) - 1)", "returned 0 rewards for 1 completions"),
}


@pytest.mark.parametrize("crime", CRIMES)
def test_the_guilty_row_is_named_and_the_others_are_kept(rewards, crime):
    body, says = CRIMES[crime]
    short = {"timeout_s": 2.0} if "2 s" in says else {}
    rewards, said = rewards(body, memory_gib=0.5, **short), rewards.said
    groups = step(6)
    rewards.score(groups, None)
    (failed,) = groups[1].failed
    assert names_of([failed]) == [(1, 2)]
    assert says in failed.errors["bad"]
    assert "reward '" in said[-1] and says in said[-1] and "row 1, sample 2" in said[-1]
    kept = [rollout for group in groups for rollout in group.rollouts]
    assert len(kept) == ROWS - 1 and all(rollout.reward == 2.0 for rollout in kept)
    metrics = reward_metrics(groups, rewards.names)
    assert metrics["reward/error_rate"] == metrics["reward/bad/error_rate"] == 1 / ROWS
    assert metrics["reward/length/error_rate"] == 0.0
    rewards.score(step(), None)  # and it goes on


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("float('nan')", "returned nan instead of a number"),
        ("float('-inf')", "returned -inf instead"),
        ("'1.0'", "returned '1.0' instead"),
        ("[2.0]", "returned [2.0] instead"),
        ("10**400", "instead of a number"),
        ("KeyError('why')", "returned KeyError('why') instead"),
    ],
)
@pytest.mark.parametrize("kind", ["def", "async def"])
def test_what_is_no_number_costs_its_own_row_only(rewards, kind, value, says):
    body = f"return [{value} if text == 'odd' else 1.0 for text in completions]"
    rewards = rewards(body, kind=kind)
    groups = step(0, 19)
    rewards.score(groups, None)
    failed = [rollout for group in groups for rollout in group.failed]
    assert names_of(failed) == [(0, 0), (4, 3)]
    assert all(says in rollout.errors["bad"] for rollout in failed)


def test_async_functions_that_share_a_call_are_told_apart(rewards, tmp_path):
    other = "async def good(prompts, **columns): return [3.0] * len(prompts)"
    rewards("time.sleep(1000)", before=other, kind="async def")
    file = tmp_path / "mine0.py"
    both = Rewards(RewardConfig(functions=[f"{file}:bad", f"{file}:good"], timeout_s=2.0))
    groups = step(3)
    try:
        both.score(groups, None)
    finally:
        both.close()
    (failed,) = groups[0].failed
    assert failed.rewards == {"good": 3.0} and list(failed.errors) == ["bad"]


ORPHAN = """
reader, writer = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.write(writer, b'%d' % os.getpid())
        while True: time.sleep(1)
    os._exit(0)
orphan = os.read(reader, 99).decode()
"""
"""Function body: starts a process that leaves its session, and waits until it has."""


def noted(note: Path) -> list[str]:
    """The line that a function writes, once it has written one."""
    while not (note.exists() and note.read_text().endswith("\n")):
        time.sleep(0.01)
    return note.read_text().split()


def test_processes_that_a_function_leaves_behind_are_ended_with_it(rewards, tmp_path):
    note = tmp_path / "note"
    rewards = rewards(f"{ORPHAN}open({str(note)!r}, 'a').write(orphan + '\\n')\nos._exit(3)".strip())
    groups = step(0)
    rewards.score(groups, None)
    assert len(groups[0].failed) == 1
    assert noted(note)
    assert not [pid for pid in noted(note) if psutil.pid_exists(int(pid))]


def test_close_ends_what_is_still_at_work_with_all_that_it_has_started(rewards, tmp_path):
    note = tmp_path / "note"
    line = f"import tempfile\nopen({str(note)!r}, 'w').write(f'{{orphan}} {{tempfile.mkdtemp()}}\\n')"
    rewards = rewards(f"{ORPHAN}{line}\ntime.sleep(1000)".strip(), functions=[], timeout_s=1000.0)
    pending = rewards.submit(step(0))
    orphan, directory = noted(note)
    assert psutil.pid_exists(int(orphan)) and Path(directory).is_dir()
    rewards.close()
    with pytest.raises(RewardError):
        rewards.collect_correctness(pending, None)
    assert not psutil.pid_exists(int(orphan)) and not Path(directory).exists()


def test_a_killed_trainer_takes_its_workers_along(tmp_path):
    note = tmp_path / "note"
    (tmp_path / "mine.py").write_text(
        "import os, time\n"
        "def hang(prompts, **columns):\n"
        f"    open({str(note)!r}, 'w').write(f'{{os.getpid()}} {{os.getppid()}}\\n')\n"
        "    time.sleep(1000)\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, str(tmp_path / "mine.py")])
    while not (note.exists() and note.read_text().endswith("\n")):
        assert trainer.poll() is None
        time.sleep(0.01)
    family = [psutil.Process(int(pid)) for pid in note.read_text().split()]
    trainer.kill()
    trainer.wait()
    assert len(family) == 2 and not psutil.wait_procs(family, timeout=60)[1]


TRAINER = """
import sys
from rlswitch.config.sections import RewardConfig
from rlswitch.rewards.rewards import Rewards
from rlswitch.types import Group, Prompt, Rollout
prompt = Prompt(index=0, messages="x", token_ids=[1])
rollout = Rollout(prompt=prompt, sample=0, token_ids=[1], logprobs=[0.0], text="", finish_reason="stop",
                  policy_version=0)
groups = [Group(prompt=prompt, rollouts=[rollout])]
Rewards(RewardConfig(functions=[sys.argv[1] + ":hang"])).score(groups, None)
"""


def test_a_signal_to_every_process_of_the_job_loses_no_row(rewards):
    signals = (
        "[os.kill(pid, s) for pid in (os.getppid(), os.getpid()) for s in (signal.SIGTERM, signal.SIGUSR1)]"
    )
    rewards = rewards(signals)
    groups = step(0)
    rewards.score(groups, None)
    assert not any(group.failed for group in groups)


def test_a_worker_that_dies_between_two_steps_loses_no_row(rewards, tmp_path):
    pid = tmp_path / "pid"
    rewards = rewards(f"open({str(pid)!r}, 'w').write(str(os.getpid()))")
    rewards.score(step(0), None)
    psutil.Process(int(pid.read_text())).kill()
    groups = step()
    rewards.score(groups, None)
    assert not any(group.failed for group in groups)


def test_more_errors_than_allowed_stop_the_run_and_change_nothing(rewards):
    rewards = rewards("raise ValueError('no')", max_error_rate=0.1)
    rewards.score(step(1, 2), None)
    groups = step(1, 2, 3)
    with pytest.raises(RewardError) as caught:
        rewards.score(groups, None)
    text = str(caught.value)
    assert "3 of 20 rollouts" in text and "reward.max_error_rate = 0.1" in text
    assert "mine0.py:bad' raised ValueError: no (at mine0.py:5) for row 0, sample 1" in text
    assert all(r.rewards == {} and not group.failed for group in groups for r in group.rollouts)
    rewards.score(step(), None)


def test_a_function_that_always_hangs_stops_the_run_within_its_budget(rewards, monkeypatch):
    monkeypatch.setattr("rlswitch.rewards.workers.pool.RETRY_TIMEOUTS", 1.0)
    rewards = rewards("while True: pass", timeout_s=2.0, max_error_rate=0.9)
    with pytest.raises(RewardError, match=r"took longer than 2 s \(it or another of \d+ that were tried"):
        rewards.score(step(*range(ROWS)), None)


def test_no_rollout_left_is_an_error_whatever_the_rate(rewards):
    rewards = rewards("raise ValueError('no')", max_error_rate=1.0)
    with pytest.raises(RewardError, match="4 of 4 rollouts"):
        rewards.score(step(0, 1, 2, 3, rows=4), None)


def test_a_refill_may_fail_whole_within_what_the_step_allows(rewards):
    rewards = rewards("raise ValueError('no')", step_size=40)  # a tenth of which may
    with pytest.raises(RewardError, match="4 of 4 rollouts have no reward"):  # it is no refill
        rewards.score(step(0, 1, 2, 3, rows=4), None, strict=True)
    groups = step(0, 1, 2, 3, rows=4)
    rewards.score(groups, None)
    assert [len(group.failed) for group in groups] == [4]
    with pytest.raises(RewardError, match="of 8 rollouts have no reward"):
        rewards.score(step(*range(8), rows=8), None)


def test_numbers_that_training_could_not_hold_are_none(rewards):
    rewards = rewards("return [1e39 if text == 'odd' else 1.0 for text in completions]")
    groups = step(2)
    rewards.score(groups, None)
    assert groups[0].failed[0].errors["bad"] == "returned 1e+39 instead of a number"


def test_a_rollout_that_no_function_scores_is_left_out(rewards):
    body = "return [None if text == 'odd' else 1.0 for text in completions]"
    rewards = rewards(body, functions=[])
    groups = step(5)
    rewards.score(groups, None)
    (failed,) = groups[1].failed
    assert failed.errors["bad"].startswith("returned None, as every function did")


def test_what_functions_print_reaches_the_console(rewards):
    rewards, said = rewards("print('seen')"), rewards.said
    rewards.score(step(0), None)
    assert said == ["seen"]


def test_failed_rollouts_are_recorded_with_their_errors_and_no_advantage(rewards):
    rewards = rewards("raise ValueError('no')")
    groups = step(6)
    rewards.score(groups, None)
    *good, bad = rollout_records(1, groups, [0.5] * (ROWS - 1))
    assert all("errors" not in record and record["advantage"] == 0.5 for record in good)
    assert bad["errors"] == groups[1].failed[0].errors and bad["sample"] == 2
    assert "advantage" not in bad and "reward" not in bad


def test_a_function_has_no_gpu_and_no_descriptor_of_the_trainer(rewards, tmp_path):
    body = "raise OSError([os.environ['CUDA_VISIBLE_DEVICES'], len(os.listdir('/proc/self/fd'))])"
    rewards = rewards(body, max_error_rate=1.0)
    with open(tmp_path / "open", "w") as file:
        os.set_inheritable(file.fileno(), True)
        groups = step(0)
        rewards.score(groups, None)
    # standard input, output and error, the connection, and the listing itself; asyncio's three
    assert "['', 8]" in groups[0].failed[0].errors["bad"]
