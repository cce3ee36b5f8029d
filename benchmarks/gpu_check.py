"""Checks everything that rlswitch claims about a GPU, stage by stage, within ten minutes.

gpu_stages.py lists the stages, gpu_programs.py has the programs they run, gpu_judges.py the limits. This
process imports neither torch nor vLLM, so it holds no GPU memory.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from rlswitch.processes.exit import DONE, FAILED
from rlswitch.records.provenance import git_state, versions

from .gpu_findings import FAIL, LOG, PASS, SKIPPED, Outputs, Verdict
from .gpu_findings import document as read_document
from .gpu_programs import ROOT
from .gpu_stages import STAGES, Context, Stage, chosen
from .settings import GpuCheckSettings

GRACE_SECONDS = 10.0
"""Time for a stage's other processes to exit after its first one has."""
LEAST_SECONDS = 10.0
"""No stage starts with less time left."""
TAIL_LINES = 30
"""Lines kept in the JSON file from each log of a failed stage."""
MORE_PACKAGES = ("peft", "trl", "triton", "flashinfer-python")
ONE_MACHINE = {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
QUIET = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(kw_only=True, slots=True)
class Result:
    """One stage in the JSON document."""

    stage: str
    shows: str
    verdict: str
    seconds: float = 0.0
    reason: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    remedy: str = ""
    """Empty unless the stage failed."""
    log: list[str] = field(default_factory=list)
    """The last lines of a failed stage's logs: often only this file leaves the machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How the processes of a stage ended."""

    exit_code: int | None
    """None: killed at the cap."""
    seconds: float
    left_behind: list[str]
    """Processes that had to be killed afterwards."""


def gpu_check(settings: GpuCheckSettings) -> int:
    """Runs the stages, prints a verdict for each, writes JSON and Markdown. Returns the exit code."""
    signal.signal(signal.SIGTERM, interrupt)  # otherwise the running stage would outlive us
    console = Console(highlight=False, markup=False, soft_wrap=True)
    directory = Path(settings.output_dir).absolute()
    for stage in STAGES:
        shutil.rmtree(directory / stage.name, ignore_errors=True)
    context = Context(
        directory=directory,
        policy=settings.policy,
        overrides=settings.overrides,
        cap_scale=settings.cap_scale,
    )
    deadline, results = time.monotonic() + settings.limit_s, list[Result]()
    began = datetime.datetime.now(datetime.UTC)
    for stage in chosen(settings.stages):
        console.print(f"{stage.name}: {stage.shows}")
        result = run_stage(stage, context, results, deadline)
        results.append(result)
        adapt(context, result)
        why = f": {result.reason}" if result.reason else ""
        console.print(f"  {result.verdict} in {result.seconds:.0f} s{why}")
        if result.remedy:
            console.print(f"  what to do: {result.remedy}")
        if stage.name == "fork" and not context.fork_server:
            console.print("  later stages start cold: engine.fork_server=false")
        facts = document(
            results, context, settings, began
        )  # written after each stage, so a kill loses no results
        files = write(facts, Path(settings.results))
    console.print(f"written: {', '.join(map(str, files))}")
    return DONE if facts["passed"] else FAILED


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def adapt(context: Context, result: Result) -> None:
    """Updates `context` for later stages after a failed one."""
    if result.stage == "machine" and result.verdict != PASS:
        context.machine = {}
    if result.stage == "fork":
        context.fork_server = result.verdict == PASS


def run_stage(stage: Stage, context: Context, earlier: list[Result], deadline: float) -> Result:
    """Runs and judges a stage, or skips it with a reason."""
    result = Result(stage=stage.name, shows=stage.shows, verdict=SKIPPED)
    left = deadline - time.monotonic()
    if reason := cannot_run(stage, context, earlier, left):
        result.reason = reason
        return result
    directory, ended = context.directory / stage.name, None
    directory.mkdir(parents=True, exist_ok=True)
    if stage.command:
        cap_s = min(stage.cap_s * context.cap_scale, left)
        ended = run_command(stage.command(context), directory / LOG, cap_s)
        result.seconds = round(ended.seconds, 1)
    verdict = judged(stage, context, directory, ended)
    result.verdict, result.reason, result.figures = verdict.verdict, verdict.reason, verdict.figures
    if result.verdict == FAIL:
        result.remedy, result.log = stage.remedy, log_tails(directory)
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)  # 7 GB of a 0.6B model
    return result


def log_tails(directory: Path) -> list[str]:
    """File name and last lines of the stage's log and of its engines' logs."""
    lines: list[str] = []
    for file in (directory / LOG, *sorted(directory.rglob("engine*.log"))):
        text = file.read_text(errors="replace") if file.is_file() else ""
        lines += [f"{file.relative_to(directory)}:", *(it[:300] for it in text.splitlines()[-TAIL_LINES:])]
    return lines


def cannot_run(stage: Stage, context: Context, earlier: list[Result], left: float) -> str:
    """Why the stage cannot run; empty if it can."""
    passed = {result.stage for result in earlier if result.verdict == PASS}
    if missing := [name for name in stage.needs if name not in passed]:
        return f"needs the stage {', '.join(missing)}, which did not pass"
    if stage.name != "machine" and not context.machine:
        return "the stage machine failed"
    if stage.command and left < LEAST_SECONDS:
        return f"no time left: {max(left, 0):.0f} s of limit_s"
    return stage.unfit(context)


def judged(stage: Stage, context: Context, directory: Path, ended: Ended | None) -> Verdict:
    if stage.name == "machine":
        context.machine = read_document(directory / "machine.json")
    exit_code = ended.exit_code if ended else 0
    outputs = Outputs(directory=directory, machine=context.machine, exit_code=exit_code)
    verdict = stage.judge(context)(outputs)
    if ended and ended.left_behind and exit_code is not None:
        left = f"left processes behind: {', '.join(ended.left_behind)}"
        reason = "; ".join(filter(None, (verdict.reason, left)))
        return Verdict(verdict=FAIL, reason=reason, figures=verdict.figures)
    return verdict


def run_command(command: list[str], log: Path, cap_s: float) -> Ended:
    """Runs a command in its own session; none of its processes survives this call."""
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,
        )
        code: int | None = None
        try:
            code = process.wait(cap_s)
            gone_at = time.monotonic() + GRACE_SECONDS
            while session_of(process.pid) and time.monotonic() < gone_at:
                time.sleep(0.1)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            left = kill(session_of(process.pid))
            process.wait()
    return Ended(exit_code=code, seconds=time.monotonic() - began, left_behind=left)


def environment() -> dict[str, str]:
    """A stage's environment: this checkout first, no network, bytecode caches on (they speed up starts)."""
    mine = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    path = os.pathsep.join(filter(None, (str(ROOT), mine.get("PYTHONPATH", ""))))
    return ONE_MACHINE | OFFLINE | QUIET | mine | {"PYTHONPATH": path}


def session_of(leader: int) -> list[psutil.Process]:
    """The processes of a session and all their descendants, also those in other sessions."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader:
                found |= {it.pid: it for it in (process, *process.children(recursive=True))}
        except (OSError, psutil.Error):
            continue
    return [it for it in found.values() if is_running(it)]


def is_running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def kill(processes: Iterable[psutil.Process]) -> list[str]:
    """Kills the processes, waits until they are gone, and returns their names."""
    killed = []
    for process in processes:
        try:
            name = f"{process.name()} (pid {process.pid})"
            process.send_signal(signal.SIGKILL)
            killed.append(name)
        except psutil.Error:
            continue
    psutil.wait_procs(list(processes), timeout=GRACE_SECONDS)
    return killed


def document(
    results: list[Result], context: Context, settings: GpuCheckSettings, began: datetime.datetime
) -> dict[str, Any]:
    """The JSON document: hardware, versions, settings and the result of each stage."""
    return {
        "benchmark": "gpu_check",
        "date": began.isoformat(timespec="seconds"),
        "hardware": {key: value for key, value in context.machine.items() if key != "driver"},
        "driver": context.machine.get("driver") or None,
        "versions": versions() | installed(MORE_PACKAGES),
        "git": git_state(),
        "settings": {"stages": settings.stages, "limit_s": settings.limit_s, "overrides": settings.overrides},
        "seconds": round(sum(result.seconds for result in results), 1),
        "passed": bool(context.machine) and not any(result.verdict == FAIL for result in results),
        "stages": [asdict(result) for result in results],
        "not_run": [stage.name for stage in STAGES if stage.name not in {it.stage for it in results}],
    }


def installed(names: Iterable[str]) -> dict[str, str]:
    """Versions of the installed packages among `names`."""
    found: dict[str, str] = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def write(facts: dict[str, Any], directory: Path) -> tuple[Path, Path]:
    """Writes gpu-NAME-DATE.json and .md; overwrites an earlier check of the same day and device."""
    directory.mkdir(parents=True, exist_ok=True)
    device = facts["hardware"].get("device", "unknown").removeprefix("NVIDIA ")
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    stem = directory / f"gpu-{name}-{facts['date'][:10]}"
    table, data = stem.with_name(stem.name + ".md"), stem.with_name(stem.name + ".json")
    data.write_text(json.dumps(facts, indent=1) + "\n")
    table.write_text(markdown(facts))
    return data, table


MAIN_FIGURES = {
    "driver_status": "cuDeviceGetCount {}",
    "stream": "torch.cuda.Stream is {}",
    "parameters": "{} parameters",
    "start_s": "started in {} s",
    "hand_over_s_max": "slowest hand-over {} s",
    "wake_s_max": "slowest wake-up {} s",
    "canary_gap_max": "canary gap {}",
    "mismatch_mean_max": "mismatch {}",
    "publish_gb_per_s": "publish {} GB/s",
    "reload_gb_per_s": "reload {} GB/s",
    "offload_gb_per_s": "offload {} GB/s",
    "sleep_freed_gib_min": "sleep frees {} GiB",
    "asleep_held_gib": "{} GiB held asleep",
    "tokens_per_s": "{} tokens/s",
    "step_s": "step {} s",
    "device_gib_max": "{} GiB in use",
    "trl_step_s": "TRL step {} s",
    "our_step_s": "our step {} s",
}
"""Figures in the table; the JSON file has all."""


SMALL_FORM = "No GPU: the stages ran with a tiny model (5M parameters), so the speeds here mean nothing."


def markdown(facts: dict[str, Any]) -> str:
    """The Markdown page: the machine, a row for each stage, and remedies for failures."""
    hardware, git = facts["hardware"], facts["git"] or {}
    ran = [result for result in facts["stages"] if result["verdict"] != SKIPPED]
    failed = [result for result in facts["stages"] if result["verdict"] == FAIL]
    revision = (git.get("revision") or "unknown")[:12] + (" with changes" if git.get("dirty") else "")
    memory = f", {hardware['device_gib']} GiB" if "device_gib" in hardware else ""
    lines = [
        f"# GPU check: {hardware.get('device', 'unknown device')}, {facts['date'][:10]}",
        "",
        f"{len(ran) - len(failed)} of {len(ran)} stages passed in {facts['seconds']:.0f} s; "
        f"{len(facts['stages']) - len(ran)} were skipped.",
        *([SMALL_FORM] if hardware.get("kind") == "cpu" else []),
        "",
        "| | |",
        "| --- | --- |",
        f"| device | {hardware.get('device', 'unknown')}{memory} |",
        f"| driver | {facts['driver'] or 'none'} |",
        f"| host | {hardware.get('cpu')}, {hardware.get('cores')} cores, {hardware.get('ram_gib')} GiB |",
        f"| versions | {', '.join(f'{name} {version}' for name, version in facts['versions'].items())} |",
        f"| revision | {revision} |",
        "",
        "| stage | verdict | seconds | shows | figures |",
        "| --- | --- | --- | --- | --- |",
    ]
    for result in facts["stages"]:
        verdict = f"**{FAIL}**" if result["verdict"] == FAIL else result["verdict"]
        figures = ", ".join(
            text.format(shown(result["figures"][name]))
            for name, text in MAIN_FIGURES.items()
            if result["figures"].get(name) is not None
        )
        row = (result["stage"], verdict, f"{result['seconds']:.0f}", result["shows"], figures)
        lines.append(f"| {' | '.join(row)} |")
    for result in failed:
        lines += ["", f"**{result['stage']}** failed: {result['reason']}.", f"To do: {result['remedy']}."]
    for result in facts["stages"]:
        if result["verdict"] == SKIPPED:
            lines += ["", f"**{result['stage']}** was skipped: {result['reason']}."]
    if facts["not_run"]:
        lines += ["", f"Not requested: {', '.join(facts['not_run'])}."]
    return "\n".join(lines) + "\n"


def shown(value: float | str) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value
