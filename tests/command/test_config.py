"""The command line: composition, exit codes, sweeps in processes. Mistakes: bad_inputs.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlswitch.algorithms.base import Algorithm
from rlswitch.command import cli
from rlswitch.command.arguments import parse
from rlswitch.command.compose import Source, compose_run
from rlswitch.command.sweep import sweep
from rlswitch.config.fields import leaves_of
from rlswitch.errors import ConfigError, EngineError, Preempted, ProofError
from rlswitch.run import OPTIONS, Run, settings_of

ROOT = Path(__file__).resolve().parents[2]
ERROR = "rlswitch: error: "
GIVEN = ["model=m", "data=d"]


@pytest.fixture(autouse=True)
def empty_directory(tmp_path, monkeypatch):
    """A wrong command line must leave nothing in the working directory."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    return folder


@pytest.fixture
def trained(monkeypatch):
    """The runs that reached the loop, which raises `trained.error` if set."""
    seen = SimpleNamespace(runs=[], error=None)

    def train(run: Run, inputs: None = None, stop_signals: None = None) -> None:
        seen.runs.append(run)
        if seen.error:
            raise seen.error

    monkeypatch.setitem(sys.modules, "rlswitch.loop", SimpleNamespace(train=train))
    monkeypatch.setitem(sys.modules, "rlswitch.planning.plan", SimpleNamespace(show=train))
    monkeypatch.setattr("rlswitch.inputs.open_inputs", lambda *_: nullcontext())
    return seen


@pytest.mark.parametrize("recipe", Source.default().options("recipe"))
def test_every_recipe_composes(recipe):
    assert compose_run([f"recipe={recipe}"], Source.default()).recipe == recipe


@pytest.mark.parametrize("algorithm", Source.default().options("algorithm"))
def test_every_algorithm_composes(algorithm):
    run = compose_run([f"algorithm={algorithm}", *GIVEN], Source.default())
    assert type(run.algorithm) in OPTIONS["algorithm"].values()


def test_short_forms_and_conversions(trained, empty_directory):
    (empty_directory / "my.py").touch()
    words = ["model=a/b", "data=c", "logger=wandb", "reward.functions=my.py:f", "switch.level=1"]
    words += ["+engine.vllm.max_num_seqs=8", "engine.vllm.block_size=32", "++trainer.lr=1e-3"]
    assert cli.main(words) == 0
    (run,) = trained.runs
    assert (run.model.path, run.data.path, run.logger) == ("a/b", "c", ["wandb"])
    assert (run.reward.functions, run.switch.level) == (["my.py:f"], "1")
    assert (run.engine.vllm, run.trainer.lr) == ({"max_num_seqs": 8, "block_size": 32}, 1e-3)


def directory(trained, *words: str) -> str:
    assert cli.main(words) == 0
    return trained.runs[-1].output_dir


def test_the_same_experiment_has_the_same_directory(trained):
    first = directory(trained, "recipe=ppo", "trainer.lr=1e-5", "model=a/b", "num_steps=3")
    assert first == "runs/ppo-model.path=a_b-trainer.lr=1e-05"
    again = ["model.path=a/b", "trainer.lr=0.00001", "recipe=ppo", "mode=plan", "resume=never"]
    assert directory(trained, *again) == first
    assert directory(trained, *again, "seed=1") == f"{first.replace('-trainer', '-seed=1-trainer')}"
    assert directory(trained, *GIVEN, "output_dir=here") == "here"
    assert directory(trained, *GIVEN).startswith("runs/run-")


def test_long_directory_names_are_cut_and_stay_apart(trained):
    long = "x" * 90
    one, two = (directory(trained, "model=m", f"data={long}{end}") for end in "ab")
    assert one != two
    assert max(len(Path(one).name), len(Path(two).name)) <= 100


@pytest.mark.parametrize(
    ("error", "code", "stderr"),
    [
        (None, 0, ""),
        (ConfigError("a", "b"), 2, f"{ERROR}a\n{ERROR}b\n"),
        (ProofError("stale"), 3, f"{ERROR}stale\n"),
        (Preempted("saved"), 75, "rlswitch: saved\n"),
        (EngineError("died"), 1, f"{ERROR}died\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(error, code, stderr, trained, capsys):
    trained.error = error
    assert cli.main(["recipe=ppo"]) == code
    assert capsys.readouterr().err == stderr


def test_a_crash_leaves_its_traceback_and_full_error_any_traceback(trained, capsys, monkeypatch):
    trained.error = ZeroDivisionError("oops")
    assert cli.main(["recipe=ppo"]) == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert cli.main(["lr=1"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_missing_vllm_is_reported_before_the_loop(trained, capsys, monkeypatch):
    monkeypatch.setattr("rlswitch.command.arguments.find_spec", lambda name: None)
    assert cli.main(["recipe=ppo"]) == 2
    assert capsys.readouterr().err.startswith(f"{ERROR}vLLM is not installed: ")
    assert not trained.runs


def test_surface():
    """Options of a single algorithm are in its own file and not listed."""
    listed = (ROOT / "tests" / "surface.txt").read_text().split()
    shared = {key for key in settings_of() if not key.startswith("algorithm.")}
    keys = sorted(shared | set(leaves_of(Algorithm, "algorithm.")))
    assert keys == listed, (
        "the settings that users can write have changed; if that is meant, edit tests/surface.txt"
        f" and say why in the commit message. New: {sorted({*keys} - {*listed})},"
        f" gone: {sorted({*listed} - {*keys})}"
    )
    assert len(keys) <= 130, "more than a person reads: a new setting has to replace another"


def in_process_of_its_own(*words: str, program: list[str] | None = None):
    command = [sys.executable, *(program or [str(ROOT / "train.py")]), *words]
    environment = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


def test_a_wrong_command_line_leaves_nothing_behind(empty_directory):
    done = in_process_of_its_own("recipe=ppo", "trainer.lrr=1", "seed=-1", "model")
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert len(lines) == 3 and all(line.startswith(ERROR) for line in lines)
    assert not list(empty_directory.iterdir())


@pytest.mark.parametrize(
    ("words", "loaded"),
    [("recipe=ppo lr=1", []), ("model=./nope data=nope.jsonl reward.functions=nope.py:f", ["numpy"])],
)
def test_settings_and_files_are_checked_without_torch(words, loaded):
    check = (
        "import sys; from rlswitch.command.cli import main; code = main(sys.argv[1:]);"
        "print(code, sorted({'torch', 'vllm', 'transformers', 'datasets', 'numpy'} & sys.modules.keys()))"
    )
    done = in_process_of_its_own(*words.split(), program=["-c", check])
    assert done.stdout == f"2 {loaded}\n" and "Traceback" not in done.stderr


@pytest.mark.processes
def test_hydra_answers_its_questions(empty_directory):
    help_text = in_process_of_its_own("--help")
    assert help_text.returncode == 0, help_text.stderr
    assert "algorithm: " in help_text.stdout and "rlswitch/config/sections.py" in help_text.stdout
    composed = in_process_of_its_own("--cfg", "job", "recipe=ppo", "model=mine")
    assert composed.stdout.startswith("recipe: ppo\n") and "path: mine\n" in composed.stdout
    assert "recipe: ppo" in in_process_of_its_own("--info", "defaults-tree", "recipe=ppo").stdout
    assert in_process_of_its_own("--cfg", "job", "lr=1").returncode == 2
    assert not list(empty_directory.iterdir())


JOB = """
import json, os, pathlib, sys
words = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
folder = pathlib.Path(words["output_dir"].strip("'"))
(folder / "pid").write_text(str(os.getpid()))
if words["seed"] == "2":
    sys.exit(3)
rows = [{"step": 1, "reward/mean": 0.5, "val/add/acc": 0.25}, {"step": 2, "reward/mean": 0.75}]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
"""


def execute(script: str, words: list[str]) -> None:
    os.execv(sys.executable, [sys.executable, script, *words])


@pytest.fixture
def swept(tmp_path, monkeypatch):
    """Runs a sweep whose jobs are a small program, and returns its exit code."""
    monkeypatch.setattr("rlswitch.processes.fork_server.SUPPORTED", False)  # each in a new interpreter

    def run(program: str, *words: str) -> int:
        script = tmp_path / "job.py"
        script.write_text(program)
        arguments = parse(["-m", *words])
        return sweep(arguments, partial(execute, str(script)))

    return run


@pytest.mark.processes
def test_a_sweep_runs_each_job_in_a_process_and_outlives_a_failure(swept, tmp_path, capfd):
    root = tmp_path / "sweep root"
    assert swept(JOB, "recipe=ppo,grpo", "seed=1,2", "num_steps=2", f"output_dir={root}") == 1
    jobs = json.loads((root / "summary.json").read_text())
    assert [job["exit_code"] for job in jobs] == [0, 3, 0, 3]
    assert [job["overrides"][:2] for job in jobs][1] == ["recipe=ppo", "seed=2"]
    assert [job["directory"] for job in jobs] == [str(root / str(n)) for n in range(4)]
    assert (jobs[0]["steps"], jobs[0]["reward"]) == (2, 0.75)
    assert jobs[0]["accuracies"] == {"val/add/acc": 0.25} and jobs[1]["reward"] is None
    pids = {(root / str(n) / "pid").read_text() for n in range(4)}
    assert len(pids) == 4 and str(os.getpid()) not in pids
    table = capfd.readouterr().out
    assert "recipe=grpo seed=2" in table and "not proven" in table and "0.750" in table


@pytest.mark.processes
def test_a_sweep_that_succeeds_leaves_one_directory(swept, empty_directory, capfd):
    assert swept(JOB, "recipe=ppo", "seed=1,3", "logger=wandb,tensorboard") == 0
    assert "seed=3 logger=[tensorboard]" in capfd.readouterr().out
    (runs,) = empty_directory.iterdir()
    (root,) = runs.iterdir()
    assert root.name.startswith("sweep-")
    names = ["0", "1", "2", "3", "comparison.md", "comparison.svg", "multirun.yaml", "summary.json"]
    assert sorted(path.name for path in root.iterdir()) == names
    assert sorted(path.name for path in (root / "0").iterdir()) == ["metrics.jsonl", "pid"]


@pytest.mark.processes
def test_a_job_that_was_refused_shows_nothing_of_the_run_whose_directory_it_was_given(swept, tmp_path, capfd):
    root = tmp_path / "sweep"
    assert swept(JOB, "recipe=ppo", "seed=1,3", f"output_dir={root}") == 0
    assert swept("raise SystemExit(2)", "recipe=ppo", "trainer.lr=1e-3,1e-4", f"output_dir={root}") == 1
    jobs = json.loads((root / "summary.json").read_text())
    assert [(job["exit_code"], job["steps"], job["reward"], job["accuracies"]) for job in jobs] == [
        (2, None, None, {}),
        (2, None, None, {}),
    ]


WAITING = """
import pathlib, signal, sys, time
def stop(signum, frame):
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGUSR1, stop)
folder = [word for word in sys.argv if word.startswith("output_dir")][0].split("=")[1].strip("'")
pathlib.Path(folder, "ready").touch()
time.sleep(60)
"""


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_job_and_ends_the_sweep(swept, tmp_path, capfd, number: int):
    root = tmp_path / "sweep"

    def interrupt() -> None:
        while not (root / "0" / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    assert swept(WAITING, "recipe=ppo", "seed=1,2", f"output_dir={root}") == 75
    thread.join()
    assert [job["exit_code"] for job in json.loads((root / "summary.json").read_text())] == [75]
    assert not (root / "1").exists()
    assert f"output_dir={root}" in capfd.readouterr().err


@pytest.mark.processes
def test_a_sweep_under_nohup_outlives_its_terminal(swept, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        hang_up = (
            "import os, signal\nos.kill(os.getppid(), signal.SIGHUP)\nos.kill(os.getpid(), signal.SIGHUP)\n"
        )
        assert swept(hang_up, "recipe=ppo", "seed=1,2", f"output_dir={tmp_path / 'sweep'}") == 0
    finally:
        signal.signal(signal.SIGHUP, before)


STAGES = """
import json, os, sys
import rlswitch.inputs, rlswitch.loop
from rlswitch.command import cli

package = os.path.dirname(rlswitch.__file__) + "/"
called, stack = [], []

def ours(frame):
    while frame is not None and not frame.f_code.co_filename.startswith(package):
        frame = frame.f_back
    return frame and frame.f_code.co_filename.removeprefix(package)

def trace(frame, event, argument):
    file = frame.f_code.co_filename
    if event == "call" and file.startswith(package) and ours(frame.f_back) == "command/cli.py":
        called.append(file.removeprefix(package))

def train(run, inputs, stop_signals):
    sys.setprofile(None)
    frame = sys._getframe()
    while frame := frame.f_back:
        stack.append(ours(frame))
    parts = [type(it).__name__ for it in (run, inputs, stop_signals)]
    print(json.dumps({"called": list(dict.fromkeys(called)), "stack": stack, "parts": parts}))

rlswitch.loop.train = train
words = "recipe=ppo engine.fork_server=false logger=[]".split()
sys.setprofile(trace)
sys.exit(cli.main(words))
"""
ASIDE = {"processes/signals.py", "checkpoint/resume.py"}
"""Checks along the way (a signal, a completed run), not stages."""


@pytest.mark.processes
def test_from_the_command_line_to_the_loop_it_is_few_files():
    done = in_process_of_its_own(program=["-c", STAGES])
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    stages = [file for file in seen["called"] if file not in ASIDE and file != "command/cli.py"]
    assert stages == ["command/arguments.py", "command/compose.py", "inputs.py"]
    assert set(seen["stack"]) == {"command/cli.py", None}
    assert seen["parts"] == ["Run", "Inputs", "StopSignals"]
    assert len(["train.py", "command/cli.py", *stages, "loop.py"]) <= 6
