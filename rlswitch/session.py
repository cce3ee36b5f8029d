"""The parts of one run, and what the loop does with all of them: log, save, stop."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rlswitch.checkpoint import checkpoint, resume
from rlswitch.checkpoint.resume import LoopState
from rlswitch.data.prompts import Prompts
from rlswitch.engines.revival import RestartingEngine
from rlswitch.errors import Preempted, RLSwitchError
from rlswitch.processes.signals import Abandoned, StopSignals
from rlswitch.records.health import Health
from rlswitch.records.monitor import Monitor
from rlswitch.rewards.metrics import reward_metrics
from rlswitch.rewards.rewards import Rewards
from rlswitch.rollouts.sampler import Sampler
from rlswitch.run import Run
from rlswitch.switch.device import resident_bytes
from rlswitch.switch.ledger import Ledger
from rlswitch.switch.switch import Switch
from rlswitch.training.trainer import Trainer
from rlswitch.types import Batch, Group, Prompt


@dataclass(kw_only=True, slots=True)
class Session:
    """The parts of one run; build.py puts them together."""

    run: Run
    ledger: Ledger
    monitor: Monitor
    switch: Switch
    engine: RestartingEngine
    sampler: Sampler
    trainer: Trainer
    rewards: Rewards
    prompts: Prompts
    held_out: list[Prompt]
    tokenizer: PreTrainedTokenizerBase
    output_dir: Path
    stop_signals: StopSignals
    health: Health
    saved_step: int
    """Step of the newest checkpoint, or of the one that the run was resumed from."""
    has_saved: bool = False
    """Whether this process saved a checkpoint."""

    def log(
        self, metrics: dict[str, float], groups: Sequence[Group] = (), batch: Batch | None = None
    ) -> None:
        """Writes one record: `metrics`, and those of switch, engine, rewards and data.

        Raises RLSwitchError, after a save, when the last steps had nothing to learn from.
        """
        step = self.trainer.version
        metrics = metrics | self.engine.metrics() | self.ledger.step_metrics()
        metrics |= {
            "training/global_step": step,
            "training/policy_version": max(step - 1, 0),
            "training/epoch": self.prompts.epoch,
        }
        advantages: list[float] = []
        if batch is not None:
            metrics |= reward_metrics(groups, self.rewards.names) | self._throughput(batch, metrics)
            advantages = batch.mean_advantages().tolist()
        self.monitor.log(step, metrics, groups, advantages)
        if batch is not None:
            self.health.check(step, metrics, self.trainer.skipped, groups)
        if end := self.health.end:
            self.save()  # there may be nothing more to learn
            raise RLSwitchError(f"{end}; checkpoint of step {step} saved")

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """A stop signal interrupts the body, whose work is repeated on resume. Raises Preempted then.

        Only for work that leaves the trainer and its memory alone, such as sampling rollouts.
        """
        step, cursor = self.trainer.version, self.prompts.cursor
        try:
            with self.stop_signals.abandoning():
                yield
        except Abandoned:
            self.prompts.seek(cursor)
            if step > self.saved_step:
                self.save()
            raise Preempted(
                f"stopped by {self.stop_signals.names[0]} in step {step + 1}, whose rollouts are discarded;"
                f" {f'checkpoint of step {step} saved' if step else 'nothing was learned yet'};"
                f" {self.how_to_resume} to resume"
            ) from None

    def save_or_stop(self) -> None:
        """Saves when a checkpoint is due or a stop signal came. Raises Preempted for a signal."""
        step, num_steps = self.trainer.version, self.run.num_steps
        if checkpoint.is_due(self.run.checkpoint, step, num_steps) or self.stop_signals:
            self.save()
        if self.stop_signals and step < num_steps:
            raise Preempted(
                f"stopped by {self.stop_signals.names[0]} after step {step}, checkpoint saved;"
                f" {self.how_to_resume} to resume"
            )

    def save(self) -> None:
        with self.ledger.work("checkpoint"):
            self.monitor.sync()
            checkpoint.save(
                self.output_dir / "checkpoints",
                self.trainer,
                self.tokenizer,
                LoopState(
                    step=self.trainer.version,
                    cursor=self.prompts.cursor,
                    wandb_id=self.monitor.wandb_id,
                    model=self.run.model.path,
                    skipped_in_a_row=self.health.skipped_in_a_row,
                    flat_in_a_row=self.health.flat_in_a_row,
                ),
                self.run.checkpoint.keep,
                self.how_to_resume,
            )
        self.saved_step, self.has_saved = self.trainer.version, True

    @property
    def how_to_resume(self) -> str:
        """The same command starts where its `resume` says, which may not be the newest checkpoint."""
        same = not self.has_saved or self.run.resume in ("auto", resume.CHANGED)
        return "run the same command again" if same else "run the same command with resume=auto"

    def _throughput(self, batch: Batch, metrics: dict[str, float]) -> dict[str, float]:
        trained = int(batch.attention_mask.sum())
        update = metrics["timing_s/update"] + metrics["timing_s/prepare"]
        pids = [os.getpid(), *self.engine.backend.pids, *self.rewards.pids]
        return {
            "perf/rollout_tokens_per_s": batch.sampled_tokens / metrics["timing_s/rollout"],
            "perf/train_tokens_per_s": trained * self.run.trainer.epochs / update,
            "perf/samples_per_s": len(batch) / metrics["timing_s/step"],
            "perf/max_device_gib": self.ledger.device.used_bytes(pids) / 2**30,
            "perf/host_rss_gib": resident_bytes(pids) / 2**30,
        }
