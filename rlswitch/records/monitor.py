"""Where a step's metrics and rollouts go: local files, trackers and the console.

The local files are the record and are written first. Trackers and the console are conveniences: a failure
there costs one line and never stops the run.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlswitch.records.console import View, make_display
from rlswitch.records.jsonl import LineFile, numbers, read, trim
from rlswitch.records.provenance import write_config
from rlswitch.records.trackers import Trackers, wandb_is_offline
from rlswitch.types import Group, Rollout

if TYPE_CHECKING:
    from rich.console import Console

    from rlswitch.run import Run

METRICS, ROLLOUTS = "metrics.jsonl", "rollouts.jsonl"
SAMPLE_EVERY = 10
"""Steps between two sample completions on the console."""


class Monitor:
    """Writes metrics.jsonl, rollouts.jsonl and config.yaml; feeds the trackers and the console.

    Records after step `kept` are dropped first, so a resumed run leaves the same files as an uninterrupted
    one; 0 drops them all. For the main process only.
    Example: `with Monitor(run, output_dir) as monitor: monitor.log(1, metrics, groups)`
    """

    def __init__(
        self,
        run: Run,
        output_dir: Path,
        kept: int = 0,
        wandb_id: str | None = None,
        console: Console | None = None,
    ):
        self.output_dir = output_dir
        self.wandb_id = wandb_id or (f"{secrets.randbits(40):08x}" if "wandb" in run.logger else None)
        """Saved in checkpoints: a resumed run continues the same W&B run."""
        self._began = time.monotonic()
        self._non_finite: set[str] = set()
        self._sampled_at: int | None = None
        output_dir.mkdir(parents=True, exist_ok=True)
        settings = write_config(run, output_dir / "config.yaml")
        for name in (METRICS, ROLLOUTS):
            # Without a checkpoint even the evaluation at step 0 is dropped.
            trim(output_dir / name, kept if kept > 0 else -1)
        self._metrics, self._rollouts = (LineFile(output_dir / n) for n in (METRICS, ROLLOUTS))
        self._view = View(title=run.recipe or output_dir.name, num_steps=run.num_steps)
        for record in read(output_dir / METRICS):
            self._view.add(numbers(record))
        self._display = make_display(console, self._view)
        self._trackers = Trackers(run, output_dir, self.wandb_id, settings, self.log_line)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finishes the trackers and prints the summary."""
        names = self._trackers.names
        if names:
            self._display.phase("finishing " + ", ".join(names))
        self._trackers.finish()
        rows = self._view.summary_rows(time.monotonic() - self._began)
        rows += [("run", str(self.output_dir))]
        rows += [("report", f"python scripts/report.py {self.output_dir}")]
        if "wandb" in names and wandb_is_offline():
            rows += [("W&B", f"offline; wandb sync {self.output_dir}/wandb/offline-run-*")]
        self._display.close("done" if kind is None else f"stopped: {kind.__name__}", rows)
        self._metrics.close()
        self._rollouts.close()

    def log(
        self,
        step: int,
        metrics: Mapping[str, float],
        groups: Sequence[Group] = (),
        advantages: Sequence[float] = (),
    ) -> None:
        """Writes one record for `step`. `advantages`: one per rollout, in the order of `groups`."""
        values = {key: _plain_number(value) for key, value in metrics.items()}
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        self._metrics.append([metrics_record(step, values)])
        if groups:
            self._rollouts.append(rollout_records(step, groups, advantages))
        for key in [key for key in values if key not in finite and key not in self._non_finite]:
            self._non_finite.add(key)
            self.log_line(f"warning: {key} is not finite at step {step}; written as null")
        self._trackers.log(step, values)
        self._view.add({"step": step, **finite})
        self._display.show(step, finite, self._sample(step, groups))

    def phase(self, name: str) -> None:
        """Shows the current phase."""
        self._display.phase(name)

    def sync(self) -> None:
        """Flushes the records to disk. Called before a checkpoint, which must not be ahead of them."""
        self._metrics.sync()
        self._rollouts.sync()

    def log_line(self, line: str) -> None:
        """Prints a line that stays on the console."""
        self._display.log_line(line)

    def _sample(self, step: int, groups: Sequence[Group]) -> Rollout | None:
        """A completion every SAMPLE_EVERY steps, each time of another prompt."""
        due = self._sampled_at is None or step - self._sampled_at >= SAMPLE_EVERY
        if not due or not groups:
            return None
        self._sampled_at = step
        return next(iter(groups[step % len(groups)].rollouts), None)


def metrics_record(step: int, values: Mapping[str, float]) -> dict[str, Any]:
    """JSON has no NaN: a metric that is not finite becomes null, and `non_finite` keeps its value."""
    odd = {key: str(value) for key, value in values.items() if not math.isfinite(value)}
    record: dict[str, Any] = {"step": step, **values} | dict.fromkeys(odd)
    return record | ({"non_finite": odd} if odd else {})


def rollout_records(step: int, groups: Sequence[Group], advantages: Sequence[float]) -> list[dict[str, Any]]:
    """One record per rollout; those whose reward failed come last, with `errors` in its place."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    records = [rollout_record(step, it) | {"reward": _finite_or_none(it.reward)} for it in rollouts]
    if advantages:
        for record, advantage in zip(records, advantages, strict=True):
            record["advantage"] = _finite_or_none(advantage)
    failed = [rollout for group in groups for rollout in group.failed]
    return [*records, *(rollout_record(step, it) | {"errors": it.errors} for it in failed)]


def rollout_record(step: int, rollout: Rollout) -> dict[str, Any]:
    record = {
        "step": step,
        "prompt_index": rollout.prompt.index,
        "sample": rollout.sample,
        "prompt": rollout.prompt.messages,
        "completion": rollout.text,
        "rewards": {name: _finite_or_none(value) for name, value in rollout.rewards.items()},
        "policy_version": rollout.policy_version,
        "finish_reason": rollout.finish_reason,
    }
    return record | ({"extra": rollout.extra} if rollout.extra else {})


def _plain_number(value: Any) -> float:
    """An int or float, also of numpy's and torch's scalars."""
    return int(value) if isinstance(value, int) else float(value)


def _finite_or_none(value: float) -> float | None:
    number = _plain_number(value)
    return number if math.isfinite(number) else None
