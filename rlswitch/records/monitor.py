"""Where a step's metrics and rollouts go: local files, trackers and the console.

The local files are the record and are written first. Trackers and the console are conveniences: a failure
there costs one line and never stops the run.
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from rich.console import Console

from rlswitch.records.console import View, make_display
from rlswitch.records.jsonl import LineFile, finite, numbers, read, trim
from rlswitch.records.provenance import write_config
from rlswitch.records.trackers import Trackers, wandb_is_offline
from rlswitch.run import Run
from rlswitch.types import Group, Rollout

METRICS, ROLLOUTS = "metrics.jsonl", "rollouts.jsonl"
SAMPLE_EVERY = 10
"""Steps between two sample completions on the console."""


class Monitor:
    """Writes metrics.jsonl, rollouts.jsonl and config.yaml; feeds the trackers and the console.

    Records after step `kept` are dropped first, so a resumed run leaves the same files as an uninterrupted
    one; 0 drops them all.
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
        self._next_sample = 0
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
        self.phase, self.log_line = self._display.phase, self._display.log_line
        self._trackers = Trackers(run, output_dir, self.wandb_id, settings, self.log_line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finishes the trackers and prints the summary."""
        if names := list(self._trackers.started):
            self._display.phase("finishing " + ", ".join(names))
        self._trackers.finish()
        rows = self._view.summary_rows(time.monotonic() - self._began)
        rows += [("run", f"{self.output_dir}"), ("report", f"python scripts/report.py {self.output_dir}")]
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
        shown = numbers(metrics)
        # JSON has no NaN: `non_finite` keeps the value.
        odd = {key: str(value) for key, value in metrics.items() if key not in shown}
        record = {"step": step, **metrics} | dict.fromkeys(odd)
        self._metrics.append([record | ({"non_finite": odd} if odd else {})])
        if groups:
            self._rollouts.append(rollout_records(step, groups, advantages))
        for key in odd:
            if key not in self._non_finite:
                self.log_line(f"warning: {key} is not finite at step {step}; written as null")
        self._non_finite.update(odd)
        self._trackers.log(step, metrics)
        self._view.add({"step": step, **shown})
        self._display.show(step, shown, self._sample(step, groups))

    def sync(self) -> None:
        """Flushes the records to disk. Called before a checkpoint, which must not be ahead of them."""
        self._metrics.sync()
        self._rollouts.sync()

    def _sample(self, step: int, groups: Sequence[Group]) -> Rollout | None:
        """A completion every SAMPLE_EVERY steps, each time of another prompt."""
        if not groups or step < self._next_sample:
            return None
        self._next_sample = step + SAMPLE_EVERY
        return next(iter(groups[step % len(groups)].rollouts), None)


def rollout_records(step: int, groups: Sequence[Group], advantages: Sequence[float]) -> list[dict[str, Any]]:
    """One record per rollout; those whose reward failed come last, with `errors` in its place."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    records = [rollout_record(step, it) | {"reward": finite(it.reward)} for it in rollouts]
    if advantages:
        for record, advantage in zip(records, advantages, strict=True):
            record["advantage"] = finite(advantage)
    failed = [rollout for group in groups for rollout in group.failed]
    return [*records, *(rollout_record(step, it) | {"errors": it.errors} for it in failed)]


def rollout_record(step: int, rollout: Rollout) -> dict[str, Any]:
    record = {
        "step": step,
        "prompt_index": rollout.prompt.index,
        "sample": rollout.sample,
        "prompt": rollout.prompt.messages,
        "completion": rollout.text,
        "rewards": {name: finite(value) for name, value in rollout.rewards.items()},
        "policy_version": rollout.policy_version,
        "finish_reason": rollout.finish_reason,
    }
    return record | ({"extra": rollout.extra} if rollout.extra else {})
