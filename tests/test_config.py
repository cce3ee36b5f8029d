"""The command line: a line for every mistake before anything heavy loads; sweeps in processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlswitch import cli
from rlswitch.algorithms.base import Algorithm
from rlswitch.arguments import parse
from rlswitch.compose import Source, compose_run
from rlswitch.config import OPTIONS, Run, settings_of
from rlswitch.options import leaves_of
from rlswitch.sweep import sweep
from rlswitch.types import ConfigError, EngineError, Preempted, ProofError

ROOT = Path(__file__).resolve().parents[1]
ERROR = "rlswitch: error: "
GIVEN = ["model=m", "data=d"]

TWO_SECTIONS = "unknown setting; did you mean 'checkpoint.every' or 'evaluation.every'?"
NO_VARIABLE = "environment variable NOPE is not set; set it, or use ${oc.env:NOPE,DEFAULT}"
SEVERAL = "several values; add -m to try each, or put the value in quotes if it is one"
NO_NEW_KEY = "unknown setting ('+' makes new keys under engine.vllm and trainer.lr_schedule_kwargs only)"
MISTAKES = [
    ("trainer.lrr=1", ["trainer.lrr = 1: unknown setting; did you mean 'trainer.lr'?"]),
    ("lr=1", ["lr = 1: unknown setting; did you mean 'trainer.lr'?"]),
    ("trainer.every=5", [f"trainer.every = 5: {TWO_SECTIONS}"]),
    (
        "+trainer.lrr=1",
        [f"+trainer.lrr = 1: {NO_NEW_KEY}; did you mean 'trainer.lr'?"],
    ),
    (
        "++zzz=1",
        [f"++zzz = 1: {NO_NEW_KEY}"],
    ),
    ("+trainer.lr=1", ["+trainer.lr = 1: is a setting already; write trainer.lr=1"]),
    ("~trainer.lr", ["~trainer.lr: a setting cannot be removed; give it another value"]),
    (
        "algorithm=grpo algorithm.gamma=1",
        ["algorithm.gamma = 1: a setting of algorithm=ppo, algorithm=reinforce_pp only"],
    ),
    ("trainer.lr=abc", ["trainer.lr = abc: must be a number"]),
    ("num_steps=1.5", ["num_steps = 1.5: must be a whole number"]),
    ("resume=false", ["resume = false: must be text; put it in quotes"]),
    ("logger=null", ["logger = null: must be a list of text: [a, b], or [] for none"]),
    (
        "engine.vllm.logprobs_mode=raw_logits engine.vllm.dtype=float16",
        [
            "engine.vllm.logprobs_mode: is fixed, a push could not be proven otherwise; leave it out",
            "engine.vllm.dtype: has a setting of its own; set model.dtype",
        ],
    ),
    (
        "algorithm=rloo algorithm.kl_coef=0.1 algorithm.kl_estimator=k3",
        [
            "algorithm.kl_estimator = k3: as a reward it does not know on which side of the reference the"
            " policy is, it would hardly hold it; set k1, or algorithm.kl_in=loss"
        ],
    ),
    (
        "engine=server engine.url=http://127.0.0.1:8000 switch.level=auto",
        [
            "switch.level = auto: what a running server can do and needs is not measured here; set 2, or what"
            " docs/levels.md says"
        ],
    ),
    (
        "algorithm=cispo algorithm.dual_clip=4",
        [
            "algorithm.dual_clip = 4.0: algorithm.surrogate=weighted bounds its weights by the ordinary"
            " clips, it would do nothing; set algorithm.dual_clip=0"
        ],
    ),
    ("model.dtype=foo", ["model.dtype = foo: not one of auto, float32, bfloat16, float16"]),
    (
        "algorithm.kl_target=0.1",
        [
            "algorithm.kl_target = 0.1: there is no reference while algorithm.kl_coef is 0,"
            " it would do nothing; set algorithm.kl_coef above 0, or algorithm.kl_target=0"
        ],
    ),
    (
        "checkpoint.merged=true",
        [
            "checkpoint.merged = true: without LoRA the policy in a checkpoint is whole"
            " already; set model.lora_rank above 0, or checkpoint.merged=false"
        ],
    ),
    ("rollout.temperature=1e-12", ["rollout.temperature = 1e-12: must be at least 0.01"]),
    (
        "algorithm.kl_coef=0.1 algorithm.kl_estimator=k1 algorithm.kl_in=loss",
        [
            "algorithm.kl_estimator = k1: in the loss its gradient is zero on average, it would penalise"
            " nothing; set k2 or k3, or algorithm.kl_in=reward"
        ],
    ),
    ("engine.vllm=3", ["engine.vllm = 3: must be a mapping: {key: value}"]),
    (
        "switch=2",
        ["switch = 2: a section, not a setting; set its keys one by one, such as switch.level"],
    ),
    ("model", ["'model': expected key=value"]),
    ("x={", ["'x={': cannot be read as key=value; quotes make any value readable: x='{'"]),
    ("seed=1,2", [f"seed = 1,2: {SEVERAL}"]),
    (
        "logger=a,b",
        ["logger = a,b: several values; write logger=[a,b] for a list, or add -m to try each"],
    ),
    ("seed=${oc.env:NOPE}", [f"seed = ${{oc.env:NOPE}}: {NO_VARIABLE}"]),
    ("seed=${no}", ["seed = ${no}: cannot be resolved: Interpolation key 'no' not found"]),
    ("trainer.lr=${model.path}", ["trainer.lr = ${model.path}: must be a number"]),
    ("trainer.lr=-1", ["trainer.lr = -1.0: must be greater than 0"]),
    ("trainer.lr=nan", ["trainer.lr = nan: must be a finite number"]),
    (
        "reward.format_pattern='('",
        [
            "reward.format_pattern = (: is no regular expression (missing ), unterminated subpattern at"
            " position 0); set one that a whole completion has to match"
        ],
    ),
    (
        "reward.functions=[judge,reward_model,judge]",
        [
            "judge.path = null: reward.functions names 'judge', there would be nothing to ask; set"
            " judge.path=<a Hugging Face directory or hub id>",
            "reward_model.path = null: reward.functions names 'reward_model', there would be nothing to ask;"
            " set reward_model.path=<a Hugging Face directory or hub id>",
            "reward.functions = ['judge', 'reward_model', 'judge']: 'judge' is there twice, it has one score;"
            " name it once",
        ],
    ),
    (
        "reward_model.path=m judge.pattern='('",
        [
            "reward_model.path = m: reward.functions = ['exact_match'] does not name 'reward_model', it would"
            " never be asked; set reward.functions=[exact_match,reward_model], or reward_model.path=null",
        ],
    ),
    (
        "reward.functions=judge judge.path=m judge.prompt='{prompt}' judge.pattern='[01]' judge.level=kv",
        [
            "judge.prompt = '{prompt}': has no {completion}, the judge would not see what it judges; put"
            " {completion} where the answer belongs",
            "judge.pattern = [01]: has 0 groups, so which is the score could not be told; put the number in"
            " parentheses, and (?:...) around what is not the score",
            "judge.level = kv: not one of 1, 2",
        ],
    ),
    ("mode=trian", ["mode = trian: not one of train, plan, rewards; did you mean 'train'?"]),
    (
        "rollout.num_prompts=4 rollout.group_size=2 trainer.minibatches=3",
        [
            "trainer.minibatches = 3: does not divide the 8 rollouts of a step"
            " (rollout.num_prompts x rollout.group_size); set a divisor of 8"
        ],
    ),
    ("--config-name trian", ["--config-name = trian: no such file in conf; did you mean 'train'?"]),
    ("--config-dir /no-such", ["configuration directory /no-such: does not exist"]),
    ("--lr 1", ["unrecognized arguments: --lr"]),
    # several at once, each with its line, and no line that only follows from another
    (
        "model trainer.lr=abc trainer.lrr=1 seed=-1 +zzz=1 mode=x",
        [
            "'model': expected key=value",
            "trainer.lr = abc: must be a number",
            "trainer.lrr = 1: unknown setting; did you mean 'trainer.lr'?",
            f"+zzz = 1: {NO_NEW_KEY}",
            "seed = -1: must be at least 0",
            "mode = x: not one of train, plan, rewards",
        ],
    ),
]


@pytest.fixture(autouse=True)
def empty_directory(tmp_path, monkeypatch):
    """Nothing of a wrong command line may appear in the directory it is typed in."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    return folder


@pytest.fixture
def errors(capsys):
    """The lines that a wrong command line is answered with, their prefix checked and removed."""

    def answer(*words: str) -> list[str]:
        assert cli.main(words) == 2
        lines = capsys.readouterr().err.splitlines()
        assert all(line.startswith(ERROR) for line in lines), lines
        return [line.removeprefix(ERROR) for line in lines]

    return answer


@pytest.fixture
def trained(monkeypatch):
    """The runs that reached the loop; it raises what is put into `trained.error`."""
    seen = SimpleNamespace(runs=[], error=None, check_environment=list)

    def train(run: Run) -> None:
        seen.runs.append(run)
        if seen.error:
            raise seen.error

    monkeypatch.setitem(sys.modules, "rlswitch.loop", SimpleNamespace(train=train))
    monkeypatch.setitem(sys.modules, "rlswitch.plan", SimpleNamespace(show=train))
    monkeypatch.setitem(sys.modules, "rlswitch.environment", seen)
    return seen


@pytest.mark.parametrize(("words", "lines"), MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_mistake_is_answered_in_its_line(words, lines, errors, empty_directory):
    assert sorted(errors(*words.split(), *GIVEN)) == sorted(lines)
    assert not list(empty_directory.iterdir())


def test_a_wrong_choice_names_the_nearest_and_all(errors):
    assert errors("recipe=pppo") == [
        "recipe = pppo: there is no such recipe; did you mean 'ppo'?"
        f" (available: {', '.join(Source.default().options('recipe'))})"
    ]
    lines = errors("algorithm=gropo", "engine=lokal", "trainer.lr=-1", "algorithm.gamma=2", "x=1")
    assert [line.partition(" (available")[0] for line in lines] == [
        "algorithm = gropo: there is no such algorithm; did you mean 'grpo'?",
        "engine = lokal: there is no such engine; did you mean 'local'?",
        "x = 1: unknown setting",
        "trainer.lr = -1.0: must be greater than 0",
    ]


def test_what_has_no_default_is_asked_for(errors):
    assert [line.partition(":")[0] for line in errors("model=")] == ["model.path", "data.path"]


def test_mistakes_in_a_recipe_name_its_file_and_key(errors, tmp_path):
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    start = "# @package _global_\ndefaults:\n  - override /algorithm: ppo\n"
    body = "trainr: {lr: 1}\nswitch: {verify: off}\nlogger: wandb\nengine: local\ndata: x\n"
    (recipe / "keys.yaml").write_text(f"{start}{body}algorithm: {{gama: 1, gamma: x}}\n")
    file = recipe / "keys.yaml"
    assert errors("--config-dir", str(tmp_path), "recipe=keys", "seed=-1") == [
        f"{file}: trainr.lr = 1: unknown setting; did you mean 'trainer.lr'?",
        f"{file}: switch.verify = False: must be text; put it in quotes",
        f"{file}: logger = wandb: must be a list of text: [a, b], or [] for none",
        f"{file}: engine = local: belongs in the defaults list: - override /engine: local",
        f"{file}: data = x: a section, not a setting; set its keys one by one, such as data.path",
        f"{file}: algorithm.gama = 1: unknown setting; did you mean 'algorithm.gamma'?",
        f"{file}: algorithm.gamma = x: must be a number",
        "seed = -1: must be at least 0",
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("# @package _global_\nmodel: {path: x\n", "line 3"),
        ("- a\n- b\n", "must start with '# @package _global_' and map keys to values"),
        ("model: {path: x}\n", "must start with '# @package _global_' and map keys to values"),
        ("", "must start with '# @package _global_' and map keys to values"),
        ("# @package _global_\ndefaults: [override /algorithm: pppo]\n", "'algorithm/pppo'"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_named(text, why, errors, tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "odd.yaml").write_text(text)
    lines = errors("--config-dir", str(tmp_path), "recipe=odd")
    assert len(lines) == 1
    assert lines[0].startswith(str(tmp_path / "recipe" / "odd.yaml"))
    assert why in lines[0]


@pytest.mark.parametrize("recipe", Source.default().options("recipe"))
def test_every_recipe_composes(recipe):
    assert compose_run([f"recipe={recipe}"], Source.default()).recipe == recipe


@pytest.mark.parametrize("algorithm", Source.default().options("algorithm"))
def test_every_algorithm_composes(algorithm):
    run = compose_run([f"algorithm={algorithm}", *GIVEN], Source.default())
    assert type(run.algorithm) in OPTIONS["algorithm"].values()


def test_short_forms_and_conversions(trained):
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
    long = "x" * 300
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


def test_a_broken_environment_is_answered_before_the_loop(trained, capsys):
    trained.check_environment = lambda: ["vLLM is not installed"]
    assert cli.main(["recipe=ppo"]) == 2
    assert capsys.readouterr().err == f"{ERROR}vLLM is not installed\n"
    assert not trained.runs


def test_surface():
    """What an algorithm alone has stands in its own file and is not listed."""
    listed = (ROOT / "tests" / "surface.txt").read_text().split()
    shared = {key for key in settings_of() if not key.startswith("algorithm.")}
    keys = sorted(shared | set(leaves_of(Algorithm, "algorithm.")))
    assert keys == listed, (
        "the settings that users can write have changed; if that is meant, edit tests/surface.txt"
        f" and say why in the commit message. New: {sorted({*keys} - {*listed})},"
        f" gone: {sorted({*listed} - {*keys})}"
    )
    assert len(keys) <= 106, "more than a person reads: make a new setting pay by removing another"


def in_process_of_its_own(*words: str, program: list[str] | None = None):
    command = [sys.executable, *(program or [str(ROOT / "train.py")]), *words]
    environment = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_a_wrong_command_line_leaves_nothing_behind(empty_directory):
    done = in_process_of_its_own("recipe=ppo", "trainer.lrr=1", "seed=-1", "model")
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert len(lines) == 3 and all(line.startswith(ERROR) for line in lines)
    assert not list(empty_directory.iterdir())


def test_a_configuration_is_checked_without_torch():
    check = (
        "import sys; from rlswitch.cli import main; code = main(sys.argv[1:]);"
        "print(code, sorted({'torch', 'vllm', 'transformers', 'numpy'} & sys.modules.keys()))"
    )
    assert in_process_of_its_own("recipe=ppo", "lr=1", program=["-c", check]).stdout == "2 []\n"


def test_hydra_answers_its_questions(empty_directory):
    help_text = in_process_of_its_own("--help")
    assert help_text.returncode == 0, help_text.stderr
    assert "algorithm: " in help_text.stdout and "rlswitch/config.py" in help_text.stdout
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
    sound = SimpleNamespace(check_environment=list)
    monkeypatch.setitem(sys.modules, "rlswitch.environment", sound)

    def run(program: str, *words: str) -> int:
        script = tmp_path / "job.py"
        script.write_text(program)
        arguments = parse(["-m", *words])
        return sweep(arguments, partial(execute, str(script)), warm=False)

    return run


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


def test_a_sweep_that_succeeds_leaves_one_directory(swept, empty_directory, capfd):
    assert swept(JOB, "recipe=ppo", "seed=1,3", "logger=wandb,tensorboard") == 0
    assert "seed=3 logger=[tensorboard]" in capfd.readouterr().out
    (runs,) = empty_directory.iterdir()
    (root,) = runs.iterdir()
    assert root.name.startswith("sweep-")
    names = ["0", "1", "2", "3", "comparison.md", "comparison.svg", "multirun.yaml", "summary.json"]
    assert sorted(path.name for path in root.iterdir()) == names
    assert sorted(path.name for path in (root / "0").iterdir()) == ["metrics.jsonl", "pid"]


def test_every_job_of_a_sweep_is_checked_before_the_first(errors, empty_directory):
    words = ["-m", "recipe=ppo,pppo", "seed=1,-1", "trainer.lr=1e-3,x", "algorithm.gama=0.9"]
    starts = ["algorithm.gama = 0.9", "recipe = pppo", "seed = -1", "trainer.lr = x"]
    assert sorted(line.partition(":")[0] for line in errors(*words)) == starts
    assert errors("-m", "recipe=ppo", "output_dir=a,b") == [
        "output_dir = a,b: a sweep has one directory, its jobs are numbered in it; give one"
    ]
    assert not list(empty_directory.iterdir())


WAITING = """
import pathlib, signal, sys, time
def stop(signum, frame):
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
folder = [word for word in sys.argv if word.startswith("output_dir")][0].split("=")[1].strip("'")
pathlib.Path(folder, "ready").touch()
time.sleep(60)
"""


def test_a_signal_reaches_the_job_and_ends_the_sweep(swept, tmp_path, capfd):
    root = tmp_path / "sweep"

    def interrupt() -> None:
        while not (root / "0" / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    assert swept(WAITING, "recipe=ppo", "seed=1,2", f"output_dir={root}") == 75
    thread.join()
    assert [job["exit_code"] for job in json.loads((root / "summary.json").read_text())] == [75]
    assert not (root / "1").exists()
    assert f"output_dir={root}" in capfd.readouterr().err
