"""What a person sees of a run: a live panel on a terminal, one line a step anywhere else."""

from __future__ import annotations

import atexit
import os
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from rlswitch.records.facts import accuracies, policy_facts, speed_facts, step_facts
from rlswitch.records.jsonl import PART_COLORS, PARTS, time_by_part
from rlswitch.text import duration, fitted, printable, prompt_text, shortened, sparkline

BAR = "\u2588"
TICK = "\u2713"
LABEL_WIDTH = 6
SAMPLE_EVERY = 10
"""Steps between two samples on the console: often enough to notice, seldom enough to read."""


@dataclass(kw_only=True, slots=True)
class Sample:
    """One completion worth showing."""

    prompt: str | list[dict[str, str]]
    completion: str
    reward: float


@dataclass(slots=True)
class View:
    """What the displays draw: the newest value of each metric, and a little history."""

    title: str
    num_steps: int
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    rewards: deque[float] = field(default_factory=lambda: deque(maxlen=200))
    parts: deque[dict[str, float]] = field(default_factory=lambda: deque(maxlen=10))
    """Seconds by part of the newest steps."""
    first_val: dict[str, float] = field(default_factory=dict)
    sample: Sample | None = None

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        self.step = max(self.step, step)
        self.metrics.update(metrics)
        for key, value in accuracies(metrics):
            self.first_val.setdefault(key, value)
        if "reward/mean" in metrics:
            self.rewards.append(metrics["reward/mean"])
        if "timing_s/step" in metrics:
            self.parts.append(time_by_part(metrics))

    @property
    def seconds_per_step(self) -> float:
        return sum(sum(step.values()) for step in self.parts) / max(len(self.parts), 1)

    @property
    def remaining(self) -> str:
        """Time to go, or nothing before the first step and after the last."""
        seconds = self.seconds_per_step * (self.num_steps - self.step)
        return f"eta {duration(seconds)}" if seconds > 0 else ""

    def shares(self) -> dict[str, float]:
        """Share of the newest steps' time by part, in the order of the step."""
        total = sum(sum(step.values()) for step in self.parts)
        sums = {part: sum(step.get(part, 0.0) for step in self.parts) for part in (*PARTS, "other")}
        return {part: value / total for part, value in sums.items() if value > 0}


class Display(ABC):
    """Where lines and metrics appear. Nothing that goes wrong on a screen may stop a run."""

    def __init__(self, console: Console, view: View):
        self.console = console
        self.view = view

    @abstractmethod
    def show(self, step: int, metrics: Mapping[str, float], sample: Sample | None) -> None: ...

    @abstractmethod
    def phase(self, name: str) -> None: ...

    @abstractmethod
    def close(self, outcome: str, rows: Sequence[tuple[str, str]]) -> None:
        """The last thing on the screen: how the run ended, and `rows` of label and text."""

    def say(self, line: str) -> None:
        self.write(Text(printable(line)))

    def write(self, *lines: Any) -> None:
        if self.console.quiet:
            return
        try:
            for line in lines:
                self.console.print(line, soft_wrap=isinstance(line, Text), highlight=False)
        except (OSError, ValueError):  # a closed or full stdout; the files hold everything
            self.console.quiet = True


class PlainDisplay(Display):
    """One line a step without control characters: for logs, pipes and CI."""

    def __init__(self, console: Console, view: View):
        super().__init__(console, view)
        self._announced: set[str] = set()

    def show(self, step: int, metrics: Mapping[str, float], sample: Sample | None) -> None:
        self.view.add(step, metrics)
        width = len(str(self.view.num_steps))
        facts = [f"step {step:>{width}}/{self.view.num_steps}", *step_facts(metrics)]
        eta = self.view.remaining if "timing_s/step" in metrics else ""
        self.write(Text("  ".join([*facts, eta]).rstrip()))
        if sample:
            self.write(Text("  " + sample_line(sample, 96)))

    def phase(self, name: str) -> None:
        if name not in self._announced:  # every step has the same ones: say each once
            self._announced.add(name)
            self.write(Text(f"... {name}"))

    def close(self, outcome: str, rows: Sequence[tuple[str, str]]) -> None:
        self.write(Text(outcome), *(Text(f"  {label:<10}  {text}") for label, text in rows))


class LiveDisplay(Display):
    """A panel that redraws itself at the bottom of a terminal; lines scroll by above it."""

    def __init__(self, console: Console, view: View):
        super().__init__(console, view)
        self._phase, self._phase_began = "starting", time.monotonic()
        self._spinner = Spinner("dots", style=PART_COLORS["switch"])
        self._live = Live(
            get_renderable=self.render,
            console=console,
            refresh_per_second=4,
            vertical_overflow="crop",
        )
        self._live.start()
        atexit.register(self._live.stop)  # gives the cursor back after a crash

    def show(self, step: int, metrics: Mapping[str, float], sample: Sample | None) -> None:
        self.view.add(step, metrics)
        self.view.sample = sample or self.view.sample
        with suppress(OSError, ValueError):  # the terminal has gone
            self._live.refresh()

    def phase(self, name: str) -> None:
        self._phase, self._phase_began = name, time.monotonic()

    def close(self, outcome: str, rows: Sequence[tuple[str, str]]) -> None:
        self._phase = ""
        with suppress(OSError, ValueError):
            self._live.stop()
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for label, text in rows:
            grid.add_row(label, Text(text))
        panel = Panel(grid, title=Text(outcome), title_align="left", border_style="dim")
        self.write(panel)

    def render(self) -> Panel:
        """At most 14 lines, whatever is known so far."""
        view, width = self.view, min(self.console.width, 100)
        inner = width - 4 - LABEL_WIDTH - 2  # borders and padding, the label, the gap after it
        grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
        grid.add_column(style="dim", no_wrap=True, width=LABEL_WIDTH)
        grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        grid.add_row("step", self._progress(inner))
        if self._phase:
            elapsed = duration(time.monotonic() - self._phase_began)
            self._spinner.update(text=Text(f"{self._phase}  {elapsed}"))
            grid.add_row("now", self._spinner)
        for label, line in panel_rows(view, inner):
            grid.add_row(label, line)
        title = Text.assemble(("rlswitch", "bold"), f"  {view.title}")
        return Panel(grid, title=title, title_align="left", border_style="dim", width=width)

    def _progress(self, width: int) -> Table:
        view = self.view
        pace = f"{view.seconds_per_step:.1f} s/step  {view.remaining}" if view.parts else ""
        bar = ProgressBar(
            total=view.num_steps,
            completed=view.step,
            complete_style=PART_COLORS["rollout"],
            finished_style=PART_COLORS["update"],
        )
        row = Table.grid(padding=(0, 2, 0, 0), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        row.add_row(f"{view.step}/{view.num_steps}", bar, Text(pace.rstrip()))
        return row


def panel_rows(view: View, width: int) -> list[tuple[str, Text]]:
    """Label and line of everything below the progress bar that there is something to say about."""
    metrics, rows = view.metrics, []
    if view.rewards:
        spark = sparkline(view.rewards, min(24, width // 3))
        line = Text.assemble((f"{view.rewards[-1]:.3f}", "bold"), "  ", (spark, PART_COLORS["update"]))
        if "reward/std" in metrics:
            line.append(f"  std {metrics['reward/std']:.3f}", "dim")
        rows.append(("reward", line))
    for key, value in list(accuracies(metrics))[:2]:
        line = Text.assemble((f"{value:.3f}", "bold"), (f"  from {view.first_val[key]:.3f}", "dim"))
        rows.append(("acc", line.append(f"  {printable(key)}", "dim")))
    rows.append(("policy", Text(fitted(policy_facts(metrics), width))))
    if view.parts:
        shares = view.shares()
        rows.append(("time", stacked_bar(shares, width)))
        rows.append(("", legend(shares, width)))
    rows.append(("switch", switch_line(metrics)))
    rows.append(("speed", Text(fitted(speed_facts(metrics), width))))
    if view.sample:
        rows.append(("sample", Text(sample_line(view.sample, width, label=False))))
    return [(label, line) for label, line in rows if line.plain]


def switch_line(metrics: Mapping[str, float]) -> Text:
    """The hand-over: its seconds, its share of the step, and whether the push was proven."""
    line = Text()
    if "switch/total_s" in metrics:
        line.append(f"{metrics['switch/total_s']:.2f} s")
    if "switch/share" in metrics:
        line.append(f"  {metrics['switch/share']:.1%} of the step", "bold " + PART_COLORS["switch"])
    if "switch/verified" in metrics:
        proven = metrics["switch/verified"] > 0
        line.append("  push")
        line.append(
            f" proven {TICK}" if proven else " not verified", PART_COLORS["update"] if proven else "dim"
        )
    if "mismatch/logp_abs_diff_max" in metrics:
        line.append(f"  mismatch max {metrics['mismatch/logp_abs_diff_max']:.1e}")
    return line


def stacked_bar(shares: Mapping[str, float], width: int) -> Text:
    """One line of `width` cells; a part that took any time has at least one."""
    cells = {part: max(1, int(share * width)) for part, share in shares.items()}
    largest = max(cells, key=lambda part: cells[part])
    cells[largest] = max(1, cells[largest] + width - sum(cells.values()))
    return Text.assemble(*((BAR * count, PART_COLORS[part]) for part, count in cells.items()))


def legend(shares: Mapping[str, float], width: int) -> Text:
    """The parts by name, the largest first; what no longer fits is small."""
    ranked = sorted(shares.items(), key=lambda item: -item[1])
    text = Text(fitted([f"{part} {share:.0%}" for part, share in ranked if share > 0.005], width))
    for part in shares:
        text.highlight_words([part], PART_COLORS[part])
    return text


def sample_line(sample: Sample, width: int, label: bool = True) -> str:
    """`prompt -> completion  reward 1.00`, cut to `width`; no completion can move the cursor."""
    head, tail = "sample: " if label else "", f"  reward {sample.reward:.2f}"
    room = max(width - len(head) - len(tail) - 4, 8)
    completion = shortened(printable(sample.completion), room // 2)
    prompt = shortened(printable(prompt_text(sample.prompt)), room - len(completion))
    return f"{head}{prompt} -> {completion}{tail}"


class StdoutConsole(Console):
    """The console on stdout; a reader that left (`| head`) silences it and does not end the run."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, sys.stdout.fileno())  # else Python complains about the pipe at its exit
        os.close(silence)


def stdout_console() -> Console:
    # FORCE_COLOR makes rich take a log file for a terminal: only a real one gets control characters
    return StdoutConsole(force_terminal=None if sys.stdout.isatty() else False)


def make_display(console: Console, view: View) -> Display:
    """The live panel where the console can redraw itself, plain lines elsewhere."""
    live = console.is_terminal and not console.is_dumb_terminal and not console.is_jupyter
    if live and not console.options.ascii_only:
        return LiveDisplay(console, view)
    return PlainDisplay(console, view)
