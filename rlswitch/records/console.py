"""A run on the console: a live panel on a terminal, one line per step anywhere else."""

import atexit
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import fmean

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from rlswitch.records.jsonl import PART_COLORS, Summary, accuracies, shares, time_by_part
from rlswitch.text import duration, fitted, printable, prompt_text, shortened, sparkline
from rlswitch.types import Rollout

LABEL_WIDTH = 6

STEP_FACTS = {
    "reward/mean": "reward {:.3f}",
    "response_length/mean": "len {:5.1f}",
    "actor/ppo_kl": "kl {:.1e}",
    "mismatch/logp_abs_diff_max": "mismatch {:.1e}",
    "switch/share": "switch {:5.1%}",
    "perf/rollout_tokens_per_s": "{:,.0f} tok/s",
    "timing_s/step": "{:.1f} s",
}
PANEL_FACTS = {
    "policy": {
        "training/policy_version": "version {:.0f}",
        "response_length/mean": "length {:.1f}",
        "actor/kl_ref": "kl ref {:.2g}",
        "actor/ppo_kl": "kl {:.2g}",
        "actor/entropy": "entropy {:.2f}",
        "actor/grad_norm": "grad {:.2g}",
        "actor/lr": "lr {:.1e}",
    },
    "switch": {
        "switch/total_s": "{:.2f} s",
        "switch/share": "{:.1%} of the step",
        "switch/verified": "push not verified",
        "mismatch/logp_abs_diff_max": "mismatch max {:.1e}",
    },
    "speed": {
        "perf/rollout_tokens_per_s": "rollout {:,.0f} tok/s",
        "perf/train_tokens_per_s": "train {:,.0f} tok/s",
        "perf/max_device_gib": "device {:.1f} GiB",
        "perf/host_rss_gib": "host {:.1f} GiB",
    },
}
PROVEN = {"switch/verified": "push proven \u2713"}


def facts(metrics: Mapping[str, float], formats: Mapping[str, str]) -> list[str]:
    return [form.format(metrics[key]) for key, form in formats.items() if key in metrics]


@dataclass(slots=True)
class View:
    """What the displays draw: totals and a short history."""

    title: str
    num_steps: int
    summary: Summary = field(default_factory=Summary)
    rewards: deque[float] = field(default_factory=lambda: deque(maxlen=200))
    parts: deque[dict[str, float]] = field(default_factory=lambda: deque(maxlen=10))
    """Seconds by part of the latest steps."""

    def add(self, record: Mapping[str, float]) -> None:
        self.summary.add(record)
        if "reward/mean" in record:
            self.rewards.append(record["reward/mean"])
        if "timing_s/step" in record:
            self.parts.append(time_by_part(record))

    @property
    def seconds_per_step(self) -> float:
        return fmean(sum(step.values()) for step in self.parts) if self.parts else 0.0

    @property
    def remaining(self) -> str:
        """Estimated time to the end; empty before the first step and after the last."""
        seconds = self.seconds_per_step * (self.num_steps - self.summary.last_step)
        return f"eta {duration(seconds)}" if seconds > 0 else ""

    def summary_rows(self, session_seconds: float) -> list[tuple[str, str]]:
        """Label and text of the lines that end a run."""
        summary = self.summary
        rows = [("steps", f"{summary.last_step}")]
        if "reward/mean" in summary.last:
            first, last = summary.first["reward/mean"], summary.last["reward/mean"]
            rows.append(("reward", f"{first:.3f} -> {last:.3f}"))
        for name, last in sorted(accuracies(summary.last)):
            rows.append(("accuracy", f"{summary.first[f'{name}/acc']:.3f} -> {last:.3f}  {name}/acc"))
        in_steps = f"{duration(summary.wall_seconds)} in steps, " if summary.wall_seconds > 0 else ""
        rows.append(("wall time", f"{in_steps}{duration(session_seconds)} this session"))
        time_shares = shares([summary.seconds]).items()
        parts = [f"{part} {share:.1%}" for part, share in time_shares if share >= 0.001]
        if parts:
            rows.append(("went to", "  ".join(parts)))
        if pushes := summary.pushes:
            rows.append(("pushes", f"{sum(pushes.values())} of {len(pushes)} proven"))
        return rows


class Display(ABC):
    """Where lines and metrics appear. A broken screen never stops a run."""

    def __init__(self, console: Console, view: View):
        self.console = console
        self.view = view

    @abstractmethod
    def show(self, step: int, metrics: Mapping[str, float], sample: Rollout | None) -> None: ...

    @abstractmethod
    def phase(self, name: str) -> None: ...

    @abstractmethod
    def stop(self) -> None: ...

    def close(self, outcome: str, rows: Sequence[tuple[str, str]]) -> None:
        """Prints the last lines: how the run ended, and `rows` of label and text."""
        self.stop()
        self.write(Text(outcome), *(Text(f"  {label:<10}  {text}") for label, text in rows))

    def log_line(self, line: str) -> None:
        self.write(Text(printable(line)))

    def write(self, *lines: Text) -> None:
        try:
            for line in lines:
                self.console.print(line, soft_wrap=True, highlight=False)
        except (OSError, ValueError):  # a closed or full stdout; the files hold everything
            self.console.quiet = True


class PlainDisplay(Display):
    """One line per step without control characters: for logs, pipes and CI."""

    def __init__(self, console: Console, view: View):
        super().__init__(console, view)
        self._announced: set[str] = set()

    def show(self, step: int, metrics: Mapping[str, float], sample: Rollout | None) -> None:
        total = self.view.num_steps
        proven = " proven" if metrics.get("switch/verified", 0) > 0 else ""
        formats = STEP_FACTS | {"switch/share": STEP_FACTS["switch/share"] + proven}
        words = [f"step {step:>{len(str(total))}}/{total}", *facts(metrics, formats)]
        words += [f"{printable(key)} {value:.3f}" for key, value in accuracies(metrics)]
        words += [self.view.remaining if "timing_s/step" in metrics else ""]
        self.write(Text("  ".join(words).rstrip()))
        if sample:
            self.write(Text("  sample: " + sample_line(sample, 88)))

    def phase(self, name: str) -> None:
        if name not in self._announced:  # every step has the same phases
            self._announced.add(name)
            self.write(Text(f"... {name}"))

    def stop(self) -> None:
        pass


class LiveDisplay(Display):
    """A panel at the bottom of a terminal that redraws itself; lines scroll by above it."""

    def __init__(self, console: Console, view: View):
        super().__init__(console, view)
        self._phase, self._phase_began = "starting", time.monotonic()
        self._spinner = Spinner("dots", style=PART_COLORS["switch"])
        self._sample: Rollout | None = None
        bar = BarColumn(None, complete_style=PART_COLORS["rollout"], finished_style=PART_COLORS["update"])
        columns = (TextColumn("{task.completed}/{task.total}"), bar, TextColumn("{task.description}"))
        self._progress = Progress(*columns, console=console, expand=True)
        self._steps = self._progress.add_task("", total=view.num_steps)
        self._live = Live(
            get_renderable=self.render, console=console, refresh_per_second=4, vertical_overflow="crop"
        )
        self._live.start()
        atexit.register(self._live.stop)  # gives the cursor back after a crash

    def show(self, step: int, metrics: Mapping[str, float], sample: Rollout | None) -> None:
        self._sample = sample or self._sample
        with suppress(OSError, ValueError):  # the terminal has gone
            self._live.refresh()

    def phase(self, name: str) -> None:
        self._phase, self._phase_began = name, time.monotonic()

    def stop(self) -> None:
        self._phase = ""
        with suppress(OSError, ValueError):
            self._live.stop()

    def render(self) -> Panel:
        """The panel: at most 14 lines."""
        view, width = self.view, min(self.console.width, 100)
        inner = width - 4 - LABEL_WIDTH - 2  # borders and padding, the label, the gap after it
        grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
        grid.add_column(style="dim", no_wrap=True, width=LABEL_WIDTH)
        grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        pace = f"{view.seconds_per_step:.1f} s/step  {view.remaining}".rstrip() if view.parts else ""
        self._progress.update(self._steps, completed=view.summary.last_step, description=pace)
        grid.add_row("step", self._progress.make_tasks_table(self._progress.tasks))
        if self._phase:
            elapsed = duration(time.monotonic() - self._phase_began)
            self._spinner.update(text=Text(f"{self._phase}  {elapsed}"))
            grid.add_row("now", self._spinner)
        rows = panel_rows(view, inner)
        if self._sample:
            rows.append(("sample", Text(sample_line(self._sample, inner))))
        for row in rows:
            grid.add_row(*row)
        title = Text.assemble(("rlswitch", "bold"), f"  {view.title}")
        return Panel(grid, title=title, title_align="left", border_style="dim", width=width)


def panel_rows(view: View, width: int) -> list[tuple[str, Text]]:
    """Label and line of the metrics below the progress bar."""
    metrics, rows = view.summary.last, []
    if view.rewards:
        spark = sparkline(view.rewards, min(24, width // 3))
        line = Text.assemble((f"{view.rewards[-1]:.3f}", "bold"), "  ", (spark, PART_COLORS["update"]))
        if "reward/std" in metrics:
            line.append(f"  std {metrics['reward/std']:.3f}", "dim")
        rows.append(("reward", line))
    for key, value in accuracies(metrics)[:2]:
        change = f"  from {view.summary.first[f'{key}/acc']:.3f}  {printable(key)}"
        rows.append(("acc", Text.assemble((f"{value:.3f}", "bold"), (change, "dim"))))
    if view.parts:
        time_shares = shares(view.parts)
        rows += [("time", stacked_bar(time_shares, width)), ("", legend(time_shares, width))]
    proven = PROVEN if metrics.get("switch/verified", 0) > 0 else {}
    for label, formats in (PANEL_FACTS | {"switch": PANEL_FACTS["switch"] | proven}).items():
        if words := fitted(facts(metrics, formats), width):
            rows.append((label, Text(words)))
    return rows


def stacked_bar(time_shares: Mapping[str, float], width: int) -> Text:
    """One line of `width` cells; every part that took time has at least one."""
    cells = {part: max(1, int(share * width)) for part, share in time_shares.items()}
    largest = max(cells, key=lambda part: cells[part])
    cells[largest] = max(1, cells[largest] + width - sum(cells.values()))
    return Text.assemble(*(("\u2588" * count, PART_COLORS[part]) for part, count in cells.items()))


def legend(time_shares: Mapping[str, float], width: int) -> Text:
    """The parts by name, the largest first, as many as fit."""
    ranked = sorted(time_shares.items(), key=lambda item: -item[1])
    text = Text(fitted([f"{part} {share:.0%}" for part, share in ranked if share > 0.005], width))
    for part in time_shares:
        text.highlight_words([part], PART_COLORS[part])
    return text


def sample_line(rollout: Rollout, width: int) -> str:
    """`prompt -> completion  reward 1.00`, cut to `width`; no completion can move the cursor."""
    tail = f"  reward {rollout.reward:.2f}"
    room = max(width - len(tail) - 4, 8)
    completion = shortened(printable(rollout.text), room // 2)
    prompt = shortened(printable(prompt_text(rollout.prompt.messages)), room - len(completion))
    return f"{prompt} -> {completion}{tail}"


class StdoutConsole(Console):
    """A console on stdout. A reader that leaves (`| head`) silences it and does not end the run."""

    def on_broken_pipe(self) -> None:
        with suppress(SystemExit):
            super().on_broken_pipe()


def make_display(console: Console | None, view: View) -> Display:
    """The live panel where the console can redraw itself, plain lines elsewhere."""
    # None is rich's default; FORCE_COLOR would make it take a log file for a terminal.
    console = console or StdoutConsole(force_terminal=None if sys.stdout.isatty() else False)
    is_plain = console.is_dumb_terminal or console.is_jupyter or console.options.ascii_only
    return LiveDisplay(console, view) if console.is_terminal and not is_plain else PlainDisplay(console, view)
