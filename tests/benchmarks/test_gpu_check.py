"""scripts/gpu_check.py: verdicts on recorded and sabotaged figures, and failing stages in the runner."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from rlswitch.benchmarks import gpu_check, gpu_judges, gpu_programs, gpu_stages
from rlswitch.benchmarks.gpu_check import Result, run_command
from rlswitch.benchmarks.gpu_findings import FAIL, LOG, PASS, SKIPPED, Limits, Outputs, Verdict
from rlswitch.benchmarks.gpu_stages import STAGES, Context, Stage, chosen, stage_problems
from rlswitch.benchmarks.settings import GpuCheckSettings, settings_from_words, words_from_flags

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
MACHINES: dict[str, dict[str, Any]] = {
    "cuda": {
        "kind": "cuda",
        "device": "NVIDIA H200",
        "device_gib": 139.8,
        "driver": "580.65",
        "compute_mode": "Default",
        "shm_free_gib": 60.0,
    },
    "cpu": {"kind": "cpu", "device": "CPU", "driver": None, "shm_free_gib": 11.0},
}
STEPS = 4


# --- records of healthy stages


def metrics() -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "switch/verified": 1.0,
            "switch/restarts": 0.0,
            "switch/canary_gap": 5e-05,
            "switch/total_s": 0.9,
            "mismatch/logp_abs_diff_mean": 5e-05,
            "actor/grad_norm": 1.5,
            "reward/mean": 0.5 + 0.01 * step,
            "timing_s/step": 5.0,
            "timing_s/update": 2.0,
            "perf/rollout_tokens_per_s": 21_000.0,
            "perf/max_device_gib": 23.0,
        }
        for step in range(1, STEPS + 1)
    ]


def phases() -> list[dict[str, Any]]:
    moved = {"publish": 1.2e9, "offload": 9.6e9, "reload": 1.2e9, "onload": 9.6e9, "sleep": 9 * GIB}
    seconds = {"publish": 0.8, "offload": 0.4, "reload": 0.5, "onload": 0.4, "sleep": 0.1}
    names = ("publish", "offload", "wake_weights", "reload", "verify", "wake_kv_cache", "sleep", "onload")
    return [
        {
            "step": step,
            "phase": name,
            "seconds": seconds.get(name, 0.05),
            "bytes": moved.get(name, 0),
            "device_free_after": 138 * GIB,
            "resident_after": GIB,
        }
        for step in range(1, STEPS + 1)
        for name in names
    ]


def turns() -> list[dict[str, Any]]:
    return [
        {
            "level": level,
            "turn": turn,
            "engine": turn % 2,
            "seconds": 3.0 if turn < 2 else 0.2,
            "start_seconds": 20.0,
            "canary_gap": 1e-05,
            "proven": True,
            "answer": [f"answer of {turn % 2}"],
        }
        for level in ("2", "1")
        for turn in range(6)
    ]


def bench() -> dict[str, Any]:
    rows = [("restart", "load", 30.0), ("1", "wake", 0.2), ("2", "wake", 0.4), ("2", "verify", 0.1)]
    summary = [
        {"mode": mode, "model": model, "what": what, "median": value}
        for mode, what, value in rows
        for model in "AB"
    ]
    return {"summary": summary, "missing": {}, "outputs": {"differing": []}}


FORK = {"driver_status": 3, "imported": True, "stream": "Stream", "sum": 3.0, "exit_code": 0, "seconds": 9.0}


class Records:
    """The files of all stages, healthy until a test changes them."""

    def __init__(self, root: Path):
        self.root = root
        self.metrics, self.phases, self.turns = metrics(), phases(), turns()
        self.bench, self.fork = bench(), dict(FORK)
        self.trl = [{"step": step, "seconds": 9.0} for step in (1, 2, 3)]

    def write(self) -> None:
        for stage in ("ppo", "push_shm", "push_disk", "server"):
            lines(self.root / stage / "metrics.jsonl", self.metrics)
            lines(self.root / stage / "switch.jsonl", self.phases)
        for level in ("1", "2"):
            lines(self.root / "turns" / f"level-{level}" / "switch.jsonl", self.phases)
        lines(self.root / "turns" / "turns.jsonl", self.turns)
        lines(self.root / "trl" / "trl.jsonl", self.trl)
        for stage, name, found in (("bench", "switch.json", self.bench), ("fork", "fork.json", self.fork)):
            (self.root / stage).mkdir(parents=True, exist_ok=True)
            (self.root / stage / name).write_text(json.dumps(found))


def lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(tmp_path)


training = partial(gpu_judges.judge_training, steps=STEPS, asleep_bytes=9 * GIB)
JUDGES: dict[str, tuple[Callable[[Outputs], Verdict], Limits]] = {
    "fork": (gpu_judges.judge_fork, gpu_judges.FORK),
    "turns": (partial(gpu_judges.judge_turns, levels=("2", "1")), gpu_judges.TURNS),
    "ppo": (partial(training, limits=gpu_judges.PPO), gpu_judges.PPO),
    "push_shm": (partial(training, limits=gpu_judges.SHM), gpu_judges.SHM),
    "push_disk": (partial(training, limits=gpu_judges.DISK), gpu_judges.DISK),
    "server": (partial(training, limits=gpu_judges.SERVER), gpu_judges.SERVER),
    "bench": (gpu_judges.judge_bench, gpu_judges.BENCH),
    "canary": (gpu_judges.judge_canary, gpu_judges.CANARY),
    "speed": (gpu_judges.judge_speed, gpu_judges.SPEED),
    "memory": (gpu_judges.judge_memory, gpu_judges.MEMORY),
    "trl": (gpu_judges.judge_trl, gpu_judges.TRL),
}


def judged(records: Records, stage: str, kind: str = "cuda", exit_code: int | None = 0) -> Verdict:
    records.write()
    (records.root / stage).mkdir(exist_ok=True)
    outputs = Outputs(directory=records.root / stage, machine=MACHINES[kind], exit_code=exit_code)
    return JUDGES[stage][0](outputs)


def set_all(rows: list[dict[str, Any]], key: str, value: Any, phase: str | None = None) -> None:
    for row in rows:
        if phase is None or row["phase"] == phase:
            row[key] = value


Sabotage = Callable[[Records], None]


def metric(key: str, value: Any) -> Sabotage:
    """Changes one step."""
    return lambda records: records.metrics[2].update({key: value})


def phase(name: str, key: str, value: Any) -> Sabotage:
    """Changes one phase in all steps."""
    return lambda records: set_all(records.phases, key, value, name)


def last_sleep(key: str, value: Any) -> Sabotage:
    return lambda records: [row for row in records.phases if row["phase"] == "sleep"][-1].update({key: value})


def turn(key: str, value: Any) -> Sabotage:
    return lambda records: records.turns[5].update({key: value})


SABOTAGES: dict[str, dict[str, Sabotage]] = {
    "fork": {
        "exit_code": lambda records: records.fork.update(exit_code=1),
        "sum_error": lambda records: records.fork.update(sum=2.0),
    },
    "turns": {
        "hand_overs": lambda records: records.turns.__delitem__(slice(4, None)),
        "hand_over_s_max": turn("seconds", 1.4),
        "canary_gap_max": turn("canary_gap", 0.3),
        "unproven_hand_overs": turn("proven", False),
        "answers_that_changed": turn("answer", ["answer of 0"]),
        "sleep_freed_bytes_min": last_sleep("bytes", 0),
    },
    "ppo": {
        "unproven_steps": metric("switch/verified", 0.0),
        "engine_restarts": metric("switch/restarts", 1.0),
        "grad_norm_min": metric("actor/grad_norm", 0.0),
        "offload_bytes_min": phase("offload", "bytes", 0),
        "onload_bytes_min": phase("onload", "bytes", 0),
        "asleep_drift_mib": last_sleep("device_free_after", 137 * GIB),
        "canary_gap_max": metric("switch/canary_gap", 0.2),
        "mismatch_mean_max": metric("mismatch/logp_abs_diff_mean", 0.05),
        "reward_first": lambda records: set_all(records.metrics, "reward/mean", 0.1),
        "reward_change": lambda records: records.metrics[-1].update({"reward/mean": 0.2}),
    },
    "push_shm": {
        "reload_gb_per_s": phase("reload", "seconds", 2.0),
        "offload_gb_per_s": phase("offload", "seconds", 2.0),
        "onload_gb_per_s": phase("onload", "seconds", 2.0),
    },
    "push_disk": {
        "canary_gap_max": metric("switch/canary_gap", 3.0),
        "mismatch_mean_max": metric("mismatch/logp_abs_diff_mean", 0.2),
        "sleep_freed_share": last_sleep("bytes", GIB),
    },
    "server": {"canary_gap_max": metric("switch/canary_gap", 0.2)},
    "bench": {
        "answers_that_differ": lambda records: records.bench["outputs"].update(
            differing=["level 2, visit 1"]
        ),
        "modes_not_measured": lambda records: records.bench.update(missing={"local, 1": "out of memory"}),
        "wake_s_max": lambda records: records.bench["summary"][2].update(median=1.5),
    },
    "canary": {
        "canary_gap_max": metric("switch/canary_gap", 3.0),
        "runs": lambda records: records.metrics.clear(),
    },
    "speed": {"tokens_per_s": lambda records: set_all(records.metrics, "perf/rollout_tokens_per_s", 900.0)},
    "memory": {
        "share_of_device_max": metric("perf/max_device_gib", 139.5),
        "device_gib_max": lambda records: set_all(records.metrics, "perf/max_device_gib", 0.0),
    },
    "trl": {
        "trl_steps": lambda records: records.trl.pop(),
        "our_steps": lambda records: records.metrics.__delitem__(slice(1, None)),
    },
}
for stage, shared in (
    ("push_shm", "push_disk"),
    ("push_shm", "ppo"),
    ("push_disk", "ppo"),
    ("server", "ppo"),
):
    limits = JUDGES[stage][1]
    more = {name: it for name, it in SABOTAGES[shared].items() if name in limits}
    SABOTAGES[stage] = more | SABOTAGES[stage]


@pytest.mark.parametrize("kind", MACHINES)
@pytest.mark.parametrize("stage", JUDGES)
def test_healthy_records_pass(records: Records, stage: str, kind: str) -> None:
    verdict = judged(records, stage, kind)
    assert (verdict.verdict, verdict.reason) == (PASS, "")
    assert verdict.figures


@pytest.mark.parametrize("stage", JUDGES)
def test_every_limit_has_a_sabotage(stage: str) -> None:
    bounded = {name for name, limit in JUDGES[stage][1].items() if limit.cuda is not None}
    assert set(SABOTAGES[stage]) == bounded


@pytest.mark.parametrize(("stage", "figure"), [(it, name) for it in SABOTAGES for name in SABOTAGES[it]])
def test_a_sabotaged_figure_fails_its_stage_by_name(records: Records, stage: str, figure: str) -> None:
    SABOTAGES[stage][figure](records)
    verdict = judged(records, stage)
    assert verdict.verdict == FAIL
    assert f"{figure} = " in verdict.reason or f"{figure} was not measured" in verdict.reason, verdict.reason


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        ({"driver_status": 0}, "CUDA is initialised"),
        ({"driver_status": None}, "cuDeviceGetCount = None"),
        ({"stream": "_StreamPlaceholder"}, "the CPU worker patched torch"),
        ({"imported": False}, "had not imported vLLM"),
        ({"exit_code": None}, "exit_code was not measured"),
    ],
)
def test_an_unfit_fork_server_is_named(records: Records, found: dict, problem: str) -> None:
    records.fork |= found
    assert problem in judged(records, "fork").reason


def test_on_a_cpu_the_fork_server_may_patch_torch_and_has_no_driver(records: Records) -> None:
    records.fork |= {"driver_status": None, "stream": "_StreamPlaceholder"}
    assert judged(records, "fork", "cpu").verdict == PASS


@pytest.mark.parametrize("stage", JUDGES)
def test_a_stage_that_left_nothing_fails(records: Records, stage: str) -> None:
    (records.root / "empty" / stage).mkdir(parents=True)
    outputs = Outputs(directory=records.root / "empty" / stage, machine=MACHINES["cuda"])
    assert JUDGES[stage][0](outputs).verdict == FAIL


def test_a_short_run_and_its_last_error_line_are_in_the_reason(records: Records) -> None:
    del records.metrics[-1]
    (records.root / "ppo").mkdir()
    (records.root / "ppo" / LOG).write_text("rlswitch: error: out of memory\nbye\n")
    reason = judged(records, "ppo", exit_code=1).reason
    assert "exit code 1: rlswitch: error: out of memory" in reason and "3 of 4 steps" in reason
    assert "killed at its cap" in judged(records, "ppo", exit_code=None).reason


def test_what_waits_at_a_missing_level_fails(records: Records) -> None:
    records.turns = [row for row in records.turns if row["level"] == "2"]
    assert "level 1: 0 of 6 hand-overs" in judged(records, "turns").reason


def test_differences_on_a_cpu_must_be_those_of_float32(records: Records) -> None:
    records.metrics[1]["switch/canary_gap"] = 0.01
    assert judged(records, "ppo", "cuda").verdict == PASS
    assert "canary_gap_max" in judged(records, "ppo", "cpu").reason


def test_the_canary_of_every_run_is_written_down(records: Records) -> None:
    records.metrics[0]["switch/canary_gap_mean"] = 0.015
    figures = judged(records, "canary").figures
    assert figures["ppo_canary_gap_first"] == figures["push_shm_canary_gap_max"] == 5e-05
    assert figures["server_canary_gap_mean_first"] == 0.015


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"not_installed": ["peft"]}, "not installed: peft"),
        ({"driver": ""}, "no driver version found"),
        ({"kind": "cpu"}, "driver 580.65 is installed, but torch finds no GPU"),
        (
            {"compute_mode": "Exclusive_Process"},
            "compute mode Exclusive_Process: trainer and engine are two processes",
        ),
    ],
)
def test_a_machine_that_lacks_something_fails(tmp_path: Path, change: dict, reason: str) -> None:
    outputs = Outputs(directory=tmp_path, machine=MACHINES["cuda"] | change)
    assert gpu_judges.judge_machine(outputs).reason == reason
    assert gpu_judges.judge_machine(Outputs(directory=tmp_path, machine={})).verdict == FAIL


def test_what_a_run_needs_is_what_the_project_depends_on(monkeypatch) -> None:
    names = gpu_programs.dependencies()
    assert {"vllm", "torch", "hydra-core", "peft"} <= set(names) and "wandb" not in names
    assert all(map(gpu_programs.is_installed, names))
    assert not gpu_programs.is_installed("no-such-package")


# --- settings and the table of stages


def test_flags_and_words_are_the_same_settings() -> None:
    flags = ["--stages", "fork,turns", "--limit-s=90", "overrides=engine.enforce_eager=true"]
    settings = settings_from_words(GpuCheckSettings, words_from_flags(flags))
    assert (settings.stages, settings.limit_s) == (["fork", "turns"], 90)
    assert settings.overrides == ["engine.enforce_eager=true"]
    assert list(words_from_flags(["--help"])) == ["--help"]


def test_a_stage_that_there_is_not_is_one_line() -> None:
    (line,) = stage_problems(GpuCheckSettings(stages=["turn", "fork"]))
    assert line.startswith("stages = turn: not one of") and line.endswith("did you mean 'turns'?")


def test_a_carried_policy_takes_the_built_in_ones_place(tmp_path: Path) -> None:
    settings = GpuCheckSettings(policy=str(tmp_path))
    (line,) = stage_problems(settings)
    assert line.startswith(f"policy = {tmp_path}: no model there")
    (tmp_path / "config.json").write_text("{}")
    assert not list(stage_problems(settings))
    context = Context(directory=tmp_path, policy=settings.policy, machine=MACHINES["cuda"])
    commands = {stage.name: stage.command for stage in STAGES if stage.command}
    for name in ("ppo", "server"):
        assert f"model.path={tmp_path}" in commands[name](context)
    assert commands["turns"](context)[-2] == commands["models"](context)[-1] == str(tmp_path)


def test_a_chosen_stage_brings_what_it_needs_in_the_tables_order() -> None:
    assert [stage.name for stage in chosen(["server", "fork"])] == ["machine", "fork", "models", "server"]
    assert chosen([]) == list(STAGES)


def test_an_unfit_fork_server_makes_the_later_stages_start_cold(tmp_path: Path) -> None:
    context = Context(directory=tmp_path, overrides=["engine.enforce_eager=true"], machine=MACHINES["cuda"])
    commands = {stage.name: stage.command for stage in STAGES if stage.command}
    assert "engine.fork_server=true" in commands["ppo"](context)
    assert "engine.enforce_eager=true" in commands["ppo"](context)
    gpu_check.adapt(context, Result(stage="fork", shows="", verdict=FAIL))
    assert "engine.fork_server=false" in commands["ppo"](context)
    assert "false" in commands["turns"](context)
    assert "fork server" in gpu_stages.cold_bench(context)


@pytest.mark.parametrize("kind", MACHINES)
def test_all_stages_together_may_take_longer_than_the_limit_but_no_one_alone(kind: str) -> None:
    assert all(stage.cap_s < GpuCheckSettings().limit_s for stage in STAGES)
    assert all(stage.shows and stage.remedy for stage in STAGES)


# --- the runner


def passing(outputs: Outputs) -> Verdict:
    if outputs.exit_code:
        return Verdict(verdict=FAIL, reason=f"exit code {outputs.exit_code}")
    return Verdict(verdict=PASS)


def stage(name: str, program: str = "", needs: tuple[str, ...] = (), cap_s: float = 60) -> Stage:
    return Stage(
        name=name,
        cap_s=cap_s,
        shows=f"what {name} shows",
        remedy=f"mend {name}",
        judge=lambda context: passing,
        command=(lambda context: [sys.executable, "-c", program]) if program else None,
        needs=needs,
    )


MACHINE = f"import pathlib; pathlib.Path('FILE').write_text({json.dumps(json.dumps(MACHINES['cpu']))})"


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[int, dict, str]]]:
    """check(stage, ...): the exit code, the JSON document and the Markdown of a check of these stages."""

    def run(*stages: Stage, limit_s: float = 300) -> tuple[int, dict, str]:
        file = tmp_path / "run" / "machine" / "machine.json"
        everything = (stage("machine", MACHINE.replace("FILE", str(file))), *stages)
        monkeypatch.setattr(gpu_check, "chosen", lambda names: everything)
        results = tmp_path / "results"
        settings = GpuCheckSettings(limit_s=limit_s, output_dir=str(tmp_path / "run"), results=str(results))
        code = gpu_check.gpu_check(settings)
        (data,), (table,) = results.glob("*.json"), results.glob("*.md")
        assert data.stem == table.stem and data.stem.startswith(("gpu-cpu-", "gpu-unknown-"))
        return code, json.loads(data.read_text()), table.read_text()

    yield run


@pytest.mark.processes
def test_a_failure_is_told_with_its_remedy_and_the_rest_goes_on(check, capsys) -> None:
    code, facts, table = check(
        stage("broken", "print('it broke'); raise SystemExit(3)"),
        stage("after", "pass"),
        stage("lost", needs=("broken",)),
    )
    found = {it["stage"]: it for it in facts["stages"]}
    assert code == 1 and not facts["passed"]
    assert found["broken"] | {"seconds": 0} == {
        "stage": "broken",
        "shows": "what broken shows",
        "verdict": FAIL,
        "seconds": 0,
        "reason": "exit code 3",
        "figures": {},
        "remedy": "mend broken",
        "log": ["log.txt:", "it broke"],
    }
    assert found["after"]["verdict"] == PASS and found["after"]["remedy"] == ""
    assert found["lost"]["verdict"] == SKIPPED and "needs the stage broken" in found["lost"]["reason"]
    assert "what to do: mend broken" in capsys.readouterr().out
    assert "To do: mend broken." in table


@pytest.mark.processes
def test_a_check_without_failures_ends_with_0_and_a_table_of_equal_rows(check) -> None:
    code, facts, table = check(stage("fine", "pass"))
    assert code == 0 and facts["passed"]
    assert facts["versions"]["rlswitch"] and facts["date"] and facts["hardware"]["device"] == "CPU"
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows if "what " in line} == {6}
    assert "2 of 2 stages passed" in table


def test_without_time_left_no_stage_begins_but_records_are_still_judged(tmp_path: Path) -> None:
    context = Context(directory=tmp_path, overrides=[], machine=MACHINES["cpu"])
    late = "no time left: 5 s of limit_s"
    assert gpu_check.cannot_run(stage("late", "pass"), context, [], left=5.0) == late
    assert gpu_check.cannot_run(stage("late", "pass"), context, [], left=50.0) == ""
    assert gpu_check.cannot_run(stage("records"), context, [], left=5.0) == ""


@pytest.mark.processes
def test_without_a_machine_nothing_has_passed(check, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "MACHINE", "raise SystemExit(1)")
    code, facts, _ = check(stage("fine", "pass"))
    assert code == 1 and facts["stages"][1]["reason"] == "the stage machine failed"


ORPHAN = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session={apart})
print(child.pid, flush=True)
time.sleep({seconds})
"""


@pytest.mark.processes
@pytest.mark.parametrize("apart", [False, True])
def test_a_stage_at_its_cap_is_killed_with_all_its_processes(tmp_path: Path, apart: bool) -> None:
    command = [sys.executable, "-c", ORPHAN.format(apart=apart, seconds=600)]
    ended = run_command(command, tmp_path / "log", 5)
    assert ended.exit_code is None
    pid = int((tmp_path / "log").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.processes
def test_a_process_left_behind_is_killed_and_fails_the_stage(check, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_check, "GRACE_SECONDS", 1.0)
    code, facts, _ = check(stage("careless", ORPHAN.format(apart=False, seconds=0)))
    assert code == 1
    assert "left processes behind: python" in facts["stages"][-1]["reason"]
    pid = int((tmp_path / "run" / "careless" / LOG).read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.processes
def test_the_check_itself_holds_nothing_of_a_gpu() -> None:
    program = (
        "import sys, rlswitch.benchmarks.gpu_check;"
        "sys.exit(str({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "set()"


@pytest.mark.engine
def test_real_stages_on_a_cpu(tmp_path: Path) -> None:
    words = ["--stages", "fork,turns", f"output_dir={tmp_path / 'run'}", f"results={tmp_path / 'results'}"]
    script = [sys.executable, str(ROOT / "scripts" / "gpu_check.py"), "--limit-s", "900", "cap_scale=6"]
    began = time.monotonic()
    done = subprocess.run([*script, *words], cwd=tmp_path, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stdout + done.stderr
    (data,) = (tmp_path / "results").glob("gpu-*.json")
    facts = json.loads(data.read_text())
    assert {it["stage"]: it["verdict"] for it in facts["stages"]} == dict.fromkeys(
        ("machine", "fork", "models", "turns"), PASS
    )
    assert "ppo" in facts["not_run"]
    assert facts["seconds"] <= time.monotonic() - began
    figures = facts["stages"][-1]["figures"]
    assert figures["hand_overs"] == 12 and figures["answers_that_changed"] == 0
