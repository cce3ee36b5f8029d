"""What the monitor writes to disk, to the trackers and to the screen."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from rich.console import Console
from samples import eventually

from rlswitch.algorithms.ppo import PPO
from rlswitch.config.sections import DataConfig, EngineConfig, ModelConfig
from rlswitch.records.console import LiveDisplay, View
from rlswitch.records.jsonl import read, trim
from rlswitch.records.monitor import Monitor
from rlswitch.records.provenance import command_line, redacted
from rlswitch.records.trackers import TRACKERS, tracker_problems
from rlswitch.run import Run
from rlswitch.text import sparkline
from rlswitch.types import Group, Prompt, Rollout

METRICS = {
    "reward/mean": 0.5,
    "response_length/mean": 5.25,
    "actor/ppo_kl": 2e-4,
    "mismatch/logp_abs_diff_max": 3e-6,
    "switch/total_s": 0.4,
    "switch/share": 0.1,
    "switch/verified": 1.0,
    "perf/rollout_tokens_per_s": 1234.0,
    "timing_s/rollout": 2.0,
    "timing_s/update": 1.5,
    "timing_s/switch": 0.4,
    "timing_s/step": 4.0,
    "training/policy_version": 0,
}


def make_run(**settings) -> Run:
    settings = {"logger": [], "num_steps": 20, **settings}
    return Run(
        recipe="ppo",
        algorithm=PPO(),
        engine=settings.pop("engine", EngineConfig()),
        model=ModelConfig(path="builtin:addition"),
        data=DataConfig(path="builtin:addition"),
        **settings,
    )


def make_groups(text: str = "3", reward: float = 1.0) -> list[Group]:
    prompt = Prompt(index=7, messages="1+2=", token_ids=[1, 2])
    rollouts = [
        Rollout(
            prompt=prompt,
            sample=sample,
            token_ids=[3],
            logprobs=[-0.1],
            text=text,
            finish_reason="stop",
            policy_version=4,
            rewards={"exact_match": reward},
            reward=reward,
        )
        for sample in range(2)
    ]
    return [Group(prompt=prompt, rollouts=rollouts)]


def plain(width: int = 160) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=False)


def terminal(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system="truecolor")


def printed(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- files -----------------------------------------------------------------------------------------


def test_a_step_becomes_one_line_of_metrics_and_one_per_rollout(tmp_path):
    with Monitor(make_run(), tmp_path, console=plain()) as monitor:
        monitor.log(5, METRICS, make_groups(), advantages=[0.5, -0.5])
    assert lines_of(tmp_path / "metrics.jsonl") == [{"step": 5, **METRICS}]
    first, second = lines_of(tmp_path / "rollouts.jsonl")
    assert first == {
        "step": 5,
        "prompt_index": 7,
        "sample": 0,
        "prompt": "1+2=",
        "completion": "3",
        "rewards": {"exact_match": 1.0},
        "reward": 1.0,
        "policy_version": 4,
        "finish_reason": "stop",
        "advantage": 0.5,
    }
    assert (second["sample"], second["advantage"]) == (1, -0.5)


def test_non_finite_metrics_keep_the_json_valid_and_are_noted(tmp_path):
    console = plain()
    with Monitor(make_run(), tmp_path, console=console) as monitor:
        for step in (1, 2):
            monitor.log(step, {"actor/grad_norm": float("nan"), "actor/lr": float("inf")})

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    line = (tmp_path / "metrics.jsonl").read_text().splitlines()[0]
    record = json.loads(line, parse_constant=refuse)
    assert record["actor/grad_norm"] is None
    assert record["non_finite"] == {"actor/grad_norm": "nan", "actor/lr": "inf"}
    assert printed(console).count("actor/grad_norm is not finite") == 1


def test_resume_leaves_the_files_of_an_uninterrupted_run(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    with Monitor(make_run(), whole, console=plain()) as monitor:
        for step in range(6):
            monitor.log(step, {"reward/mean": step / 10}, make_groups(str(step)))
    monitor = Monitor(make_run(), cut, console=plain())  # killed: never closed
    for step in range(5):
        monitor.log(step, {"reward/mean": step / 10}, make_groups(str(step)))
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with (cut / name).open("a") as file:
            file.write('{"step": 5, "rewa')
    with Monitor(make_run(), cut, kept=3, console=plain()) as monitor:
        for step in (4, 5):
            monitor.log(step, {"reward/mean": step / 10}, make_groups(str(step)))
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_a_run_without_a_checkpoint_starts_with_empty_files(tmp_path):
    with Monitor(make_run(), tmp_path, console=plain()) as monitor:
        monitor.log(0, {"val/a/acc": 0.1})
    with Monitor(make_run(), tmp_path, console=plain()) as monitor:
        monitor.log(0, {"val/a/acc": 0.1})
    assert len(lines_of(tmp_path / "metrics.jsonl")) == 1


def test_trim_drops_later_records_and_torn_lines_only(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"step": 1}\nnonsense\n[2]\n{"step": 2}\n{"step": 3}\n{"step": 2, "x"')
    trim(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    trim(tmp_path / "new.jsonl", 2)
    assert list(read(tmp_path / "new.jsonl")) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.jsonl", "x.jsonl"]


class GoneScreen(io.StringIO):
    """A closed terminal."""

    gone = False

    def write(self, text: str) -> int:
        if self.gone:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().write(text)


# rich's redrawing thread ends with an error that nobody reads.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("live", [True, False])
def test_a_terminal_that_has_gone_does_not_stop_a_run(tmp_path, live: bool):
    screen = GoneScreen()
    with Monitor(make_run(), tmp_path, console=Console(file=screen, force_terminal=live)) as monitor:
        monitor.log(1, METRICS, make_groups())
        screen.gone = True
        monitor.log(2, METRICS, make_groups())
        monitor.log_line("nobody hears this")
    assert [record["step"] for record in lines_of(tmp_path / "metrics.jsonl")] == [1, 2]


# -- config.yaml -----------------------------------------------------------------------------------


def test_config_tells_settings_and_versions_but_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SERVICE_KEY", "abcdefgh12345678")
    options = {
        "api_key": "zzz",
        "hf_token": "yyy",
        "password": 1234,
        "max_num_seqs": 64,
        "url": "https://me:pass@host/x",
        "note": "see abcdefgh12345678",
        "nested": [{"clientSecret": "xxx"}],
    }
    run = make_run(engine=EngineConfig(vllm=options))
    with Monitor(run, tmp_path, console=plain()):
        pass
    text = (tmp_path / "config.yaml").read_text()
    config = yaml.safe_load(text)
    assert config["num_steps"] == 20
    assert config["algorithm"]["class"] == "PPO"
    assert config["data"]["prompt_key"] == "prompt"
    assert config["engine"]["vllm"]["max_num_seqs"] == 64
    assert {"python", "rlswitch", "torch"} <= set(config["versions"])
    assert not [word for word in ("zzz", "yyy", "xxx", "1234", "me:pass") if word in text]


def test_numbers_and_names_that_only_sound_secret_are_kept():
    settings = {"max_new_tokens": 256, "prompt_key": "question", "tokenizer": "auto", "seed": None}
    assert redacted(settings) == settings
    assert redacted("hf_" + "a" * 30) == "(redacted)"


def test_the_command_is_kept_without_its_secrets():
    line = command_line(["train.py", "recipe=ppo", "+engine.vllm.api_key=abc", "data.prompt_key=q"])
    assert "recipe=ppo" in line
    assert "data.prompt_key=q" in line
    assert "abc" not in line
    assert "s3cret" not in command_line(["train.py", "engine.vllm={hf_token: s3cret, x: 1}"])


# -- trackers --------------------------------------------------------------------------------------


@pytest.fixture
def tracker(monkeypatch):
    """A tracker that accelerate knows as `fake`; its behaviour is set on the class."""
    tracking = pytest.importorskip("accelerate.tracking")

    class Fake(tracking.GeneralTracker):
        name = "fake"
        requires_logging_directory = False
        on_log = staticmethod(lambda: None)

        def __init__(self, project: str):
            super().__init__()

        @property
        def tracker(self) -> None:
            return None

        @tracking.on_main_process
        def store_init_configuration(self, values):
            self.seen.append(("config", values))

        @tracking.on_main_process
        def log(self, values, step=None, **_):
            self.on_log()
            self.seen.append((step, values))

        @tracking.on_main_process
        def finish(self):
            self.seen.append(("finish", None))

    Fake.seen = []
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "fake", Fake)
    monkeypatch.setitem(TRACKERS, "fake", ("accelerate",))
    return Fake


def test_a_tracker_gets_the_settings_then_every_step_then_the_end(tmp_path, tracker):
    with Monitor(make_run(logger=["fake"]), tmp_path, console=plain()) as monitor:
        assert monitor.wandb_id is None
        for step in (1, 2):
            monitor.log(step, METRICS)
    assert [entry[0] for entry in tracker.seen] == ["config", 1, 2, "finish"]
    assert tracker.seen[0][1]["trainer.lr"] == 1e-6
    assert tracker.seen[1][1]["reward/mean"] == 0.5


def test_a_tracker_picks_no_device_for_the_trainer(tmp_path, tracker):
    from accelerate.state import PartialState

    PartialState._reset_state()
    with Monitor(make_run(logger=["fake"]), tmp_path, console=plain()) as monitor:
        monitor.log(1, METRICS)
    assert len(tracker.seen) == 3
    assert not PartialState._shared_state


def test_a_tracker_that_raises_is_left_with_one_warning(tmp_path, tracker):
    def fail():
        raise ConnectionError("server\nis gone")

    tracker.on_log = staticmethod(fail)
    console = plain()
    with Monitor(make_run(logger=["fake"]), tmp_path, console=console) as monitor:
        for step in range(1, 6):
            monitor.log(step, METRICS)
    assert printed(console).count("warning: fake failed: ConnectionError: server is gone") == 1
    assert len(lines_of(tmp_path / "metrics.jsonl")) == 5
    assert printed(console).splitlines()[-1].strip().startswith("report")


@pytest.mark.parametrize("call", ["start", "store_init_configuration", "log", "finish"])
def test_the_first_failure_drops_a_tracker_and_leaves_the_others(tmp_path, tracker, monkeypatch, call: str):
    calls: list[str] = []

    class Broken(tracker):
        """Fails at one call; some trackers raise SystemExit."""

        seen: ClassVar[list] = []
        name = "broken"

    def fail(self, *_, **__):
        calls.append(call)
        raise SystemExit(1)

    setattr(Broken, call, fail)
    monkeypatch.setitem(sys.modules["accelerate.tracking"].LOGGER_TYPE_TO_CLASS, "broken", Broken)
    console = plain()
    with Monitor(make_run(logger=["broken", "fake"]), tmp_path, console=console) as monitor:
        for step in (1, 2):
            monitor.log(step, METRICS)
    assert calls == [call]
    assert printed(console).count("warning: broken failed: SystemExit: 1; the run continues without it") == 1
    assert [entry[0] for entry in tracker.seen] == ["config", 1, 2, "finish"]


def test_an_interrupt_inside_a_tracker_stops_the_run(tmp_path, tracker):
    def interrupt():
        raise KeyboardInterrupt

    tracker.on_log = staticmethod(interrupt)
    with (
        pytest.raises(KeyboardInterrupt),
        Monitor(make_run(logger=["fake"]), tmp_path, console=plain()) as it,
    ):
        it.log(1, METRICS)


def test_unknown_trackers_are_rejected():
    assert tracker_problems([]) == []
    [problem] = tracker_problems(["wandbb"])
    assert problem.startswith("logger = wandbb: ")
    assert problem.endswith("did you mean 'wandb'?")


def test_a_tracker_that_is_not_installed_says_what_to_do(monkeypatch):
    monkeypatch.setitem(TRACKERS, "mlflow", ("no_such_module",))
    [problem] = tracker_problems(["wandb", "mlflow"])
    assert "install mlflow or set logger=[wandb]" in problem


def test_the_trackers_are_those_of_accelerate():
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert set(TRACKERS) == set(LOGGER_TYPE_TO_CLASS)


@pytest.mark.processes
def test_offline_wandb_goes_on_in_the_same_run_after_a_resume(tmp_path, monkeypatch, capfd):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    with Monitor(make_run(logger=["wandb"]), tmp_path, console=plain()) as monitor:
        monitor.log(1, METRICS)
    time.sleep(1.1)  # W&B folder names have a resolution of one second
    console = plain()
    resumed = Monitor(make_run(logger=["wandb"]), tmp_path, 1, monitor.wandb_id, console=console)
    with resumed:
        resumed.log(2, METRICS)
    assert resumed.wandb_id == monitor.wandb_id
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{monitor.wandb_id}.wandb"))
    # W&B's own process writes them, possibly a little later.
    assert eventually(lambda: [wandb_steps(file) for file in files] == [{1}, {2}]), files
    assert "wandb sync" in printed(console)
    assert capfd.readouterr() == ("", "")


def test_a_session_without_wandb_keeps_the_run_for_the_next_one_with_it(tmp_path):
    with Monitor(make_run(logger=[]), tmp_path, wandb_id="abc", console=plain()) as monitor:
        assert monitor.wandb_id == "abc"
    with Monitor(make_run(logger=[]), tmp_path, console=plain()) as monitor:
        assert monitor.wandb_id is None


def wandb_steps(path: Path) -> set[int]:
    """The steps in a file of W&B's, which has no public reader: `_step` and its value as JSON."""
    found = re.findall(rb"\x12\x05_step\x82\x01(.)(\d+)", path.read_bytes())
    return {int(digits[: ord(length)]) for length, digits in found}  # the next byte belongs to a checksum


# -- console ---------------------------------------------------------------------------------------


def test_plain_output_is_a_line_a_step_without_control_characters(tmp_path):
    console = plain()
    with Monitor(make_run(), tmp_path, console=console) as monitor:
        monitor.phase("engine start")
        for step in range(1, 13):
            monitor.phase("rollout")
            monitor.log(step, METRICS, make_groups("3\x1b[2J\r\n"))
        monitor.log_line("notice \x1b]0;title\x07")
    text = printed(console)
    assert not [char for char in text if ord(char) < 32 and char != "\n"]
    steps = [line for line in text.splitlines() if line.startswith("step ")]
    assert len(steps) == 12
    assert len({line.index("reward") for line in steps}) == 1
    assert text.count("... rollout") == 1
    assert text.count("sample: 1+2= -> 3\\x1b[2J") == 2
    assert "switch 10.0% proven" in steps[0]
    assert "pushes" in text


def test_a_terminal_shows_a_compact_panel():
    console, view = terminal(), View(title="run", num_steps=20)
    [group] = make_groups("3\x1b[2J")
    display = LiveDisplay(console, view)
    display.phase("engine start")
    view.add({"step": 0, "val/addition/acc": 0.125})
    for step in range(1, 6):
        view.add({"step": step, **METRICS})
        display.show(step, METRICS, group.rollouts[0])
    display.phase("rollout")
    sketch = Console(file=io.StringIO(), width=80, force_terminal=False)
    sketch.print(display.render())
    display.close("done", [])
    lines = printed(sketch).splitlines()
    assert len(lines) <= 14
    assert max(map(len, lines)) <= 80
    for fact in ("5/20", "rollout", "0.125", "10.0% of the step", "proven", "1,234 tok/s", "-> 3"):
        assert any(fact in line for line in lines), fact
    assert "\x1b[2J" not in printed(console)


def test_a_panel_can_be_drawn_before_anything_is_known(tmp_path):
    console = terminal(width=40)
    with Monitor(make_run(), tmp_path, console=console) as monitor:
        monitor.phase("engine start")
        assert eventually(lambda: "engine start" in printed(console))  # rich redraws at intervals


def test_an_exception_closes_the_display_and_passes_on(tmp_path):
    console = plain()
    with (
        pytest.raises(RuntimeError),
        Monitor(make_run(), tmp_path, console=console) as monitor,
    ):
        monitor.log(1, METRICS)
        raise RuntimeError("boom")
    assert "stopped: RuntimeError" in printed(console)


def test_a_reader_that_leaves_does_not_end_the_run(tmp_path):
    program = (
        "import sys; from pathlib import Path; from test_monitor import *\n"
        "with Monitor(make_run(num_steps=3000), Path(sys.argv[1])) as monitor:\n"
        "    for step in range(1, 3001): monitor.log(step, METRICS)\n"
    )
    here, tests, root = Path(__file__).resolve().parents[:3]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (root, tests, here)))}
    done = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    assert done.stdout is not None
    done.stdout.readline()
    done.stdout.close()
    _, errors = done.communicate(timeout=120)
    assert (done.returncode, errors) == (0, b"")
    assert len(lines_of(tmp_path / "metrics.jsonl")) == 3000


def test_a_sparkline_follows_its_values():
    assert sparkline([0, 1], 10) == "\u2581\u2588"
    assert sparkline([2, 2, 2], 10) == "\u2581" * 3
    assert len(sparkline(list(range(100)), 24)) == 24
