"""Everything a run is made of, built in the order the device demands and taken down whatever happens."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from rlswitch.checkpoint import checkpoint, resume
from rlswitch.checkpoint.resume import LoopState, Start
from rlswitch.checkpoint.run_directory import check_disk_space, checkpoint_size, only_run_in, room_needed
from rlswitch.data.hub import load_tokenizer, resolve_model
from rlswitch.data.prompts import Prompts
from rlswitch.engines.revival import RestartingEngine
from rlswitch.engines.spec import engine_dtype
from rlswitch.engines.start import check_engine, start_engine
from rlswitch.errors import Preempted, RLSwitchError
from rlswitch.inputs import Inputs
from rlswitch.planning.footprint import ModelShape
from rlswitch.planning.plan import level_of
from rlswitch.planning.policy import policy_spec
from rlswitch.processes.signals import Abandoned, StopSignals, leave_at_second_interrupt
from rlswitch.proof.canary import canary_length, canary_sequences
from rlswitch.proof.fingerprint import checkpoint_elements
from rlswitch.records.health import Health
from rlswitch.records.monitor import Monitor
from rlswitch.rewards.models.judge import find_judge
from rlswitch.rewards.models.reward_model import find_reward_model
from rlswitch.rewards.models.tenant import Candidate, RewardTenant
from rlswitch.rewards.scorer import Scorer
from rlswitch.run import Run
from rlswitch.switch.device import Device, resident_bytes
from rlswitch.switch.ledger import Ledger
from rlswitch.switch.switch import Switch
from rlswitch.training.models import check_model
from rlswitch.training.publish import Publisher, choose_directory
from rlswitch.training.schedule import check_schedule
from rlswitch.training.trainer import Trainer
from rlswitch.types import Batch, Group, Prompt


@dataclass(kw_only=True, slots=True)
class Session:
    """The parts of one run. The loop only reads it."""

    run: Run
    device: Device
    ledger: Ledger
    monitor: Monitor
    switch: Switch
    engine: RestartingEngine
    trainer: Trainer
    scorer: Scorer
    tenants: list[RewardTenant]
    """The models among the rewards, in the order of reward.functions."""
    prompts: Prompts
    held_out: list[Prompt]
    tokenizer: PreTrainedTokenizerBase
    output_dir: Path
    stop_signals: StopSignals
    health: Health
    saved_step: int
    """Of the newest checkpoint, or the one that the run goes on from."""
    has_saved: bool = False

    def log(
        self,
        metrics: dict[str, float],
        groups: Sequence[Group] = (),
        batch: Batch | None = None,
    ) -> None:
        """One record: the caller's metrics, and what switch, engine, rewards and data have to say."""
        step = self.trainer.version
        metrics = metrics | self.engine.metrics() | self.ledger.step_metrics()
        metrics |= {
            "training/global_step": step,
            "training/policy_version": max(step - 1, 0),
            "training/epoch": self.prompts.epoch,
        }
        advantages: list[float] = []
        if groups and batch is not None and batch.advantages is not None:
            metrics |= self.scorer.metrics(groups) | self._throughput(groups, batch, metrics)
            advantages = batch.mean_advantages().tolist()
        self.monitor.log(step, metrics, groups, advantages)
        if groups:
            self.health.check(step, metrics, self.trainer.skipped, groups)
        if end := self.health.end:
            self.save()  # there may be nothing more to learn
            raise RLSwitchError(f"{end}; checkpoint of step {step} saved")

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """A stop signal breaks off what is inside, and no step is the less for it. Raises Preempted then.

        Only for what leaves the trainer and its memory alone: the rollouts are made again on resume.
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
                f"stopped by {self.stop_signals.names[0]} in step {step + 1}, whose rollouts are given up;"
                f" {f'checkpoint of step {step} saved' if step else 'nothing was learned yet'};"
                f" {self.how_to_go_on} to go on"
            ) from None

    @property
    def how_to_go_on(self) -> str:
        """The same command begins where `resume` says again, and not at what was saved since."""
        fine = not self.has_saved or self.run.resume in ("auto", resume.CHANGED)
        return "run the same command again" if fine else "run the same command with resume=auto"

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
                self.how_to_go_on,
            )
        self.saved_step, self.has_saved = self.trainer.version, True

    def _throughput(
        self, groups: Sequence[Group], batch: Batch, metrics: dict[str, float]
    ) -> dict[str, float]:
        sampled, trained = batch.sampled_tokens, int(batch.attention_mask.sum())
        update = metrics["timing_s/update"] + metrics["timing_s/prepare"]
        pids = [os.getpid(), *self.engine.backend.pids, *(pid for it in self.tenants for pid in it.pids)]
        return {
            "perf/rollout_tokens_per_s": sampled / metrics["timing_s/rollout"],
            "perf/train_tokens_per_s": trained * self.run.trainer.epochs / update,
            "perf/samples_per_s": len(batch) / metrics["timing_s/step"],
            "perf/max_device_gib": self.device.used_bytes(pids) / 2**30,
            "perf/host_rss_gib": resident_bytes(pids) / 2**30,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Models:
    """What there is at the paths of models: looked at, and not loaded."""

    path: str
    """The policy's directory."""
    tokenizer: PreTrainedTokenizerBase
    candidates: list[Candidate]
    """The models among the rewards."""


@contextmanager
def open_session(run: Run, inputs: Inputs, stop_signals: StopSignals) -> Iterator[Session]:
    """Builds a run and closes it. A stop signal breaks off the building, and waits for the closing."""
    disable_progress_bar()
    with ExitStack() as stack:
        leave_at_second_interrupt(stack)
        with stop_signals.abandoning():
            session = build(run, inputs, stop_signals, stack)
        yield session


def build(run: Run, inputs: Inputs, stop_signals: StopSignals, stack: ExitStack) -> Session:
    """Each tenant is started on a device that the others have left; `stack` takes them down."""
    assert run.output_dir is not None, "the command line names it"
    output_dir = Path(run.output_dir)
    models = look_at_models(run, inputs, print)
    run.switch.level = level_of(run)
    device = Device.detect()
    itemsize = getattr(torch, engine_dtype(run.model.dtype, device)).itemsize
    nbytes = itemsize * checkpoint_elements(Path(models.path))
    by_disk = choose_directory(run.switch.transport, nbytes, output_dir) == output_dir
    stack.enter_context(only_run_in(output_dir, print))
    begin = choose_start(run, itemsize, output_dir, pushes=2 * nbytes if by_disk else 0)
    state = begin.state
    inputs.prompts.seek(state.cursor)
    monitor = stack.enter_context(Monitor(run, output_dir, begin.kept, state.wandb_id))
    ledger = Ledger(device, output_dir, begin.kept, state.step)
    say = inputs.scorer.say = monitor.log_line
    ledger.on_phase = monitor.phase
    publisher = Publisher(run.switch.transport, nbytes, output_dir)
    stack.callback(publisher.close)
    monitor.phase("engine start")
    spec = policy_spec(run, models.path, device)
    log_path = output_dir / "engine.log"
    engine = start_engine(spec, models.tokenizer, ledger, log_path, publisher.root, log=say)
    stack.callback(engine.close)
    taken = [device.total_bytes() - device.free_bytes()]  # CUDA graphs and workspaces too
    switch = Switch(ledger, holder=engine)
    tenants = []
    for candidate in models.candidates:
        monitor.phase(f"{candidate.name} start")
        tenants.append(start_tenant(candidate, switch, output_dir, publisher.root, say, stack))
        taken.append(device.total_bytes() - device.free_bytes())
    switch.vacate()
    monitor.phase("trainer start")
    trainer = build_trainer(run, inputs, models, ledger, publisher, engine.backend.block_size, say)
    trainer.parking.engine_bytes = max(taken)
    if begin.path:
        checkpoint.restore(begin.path, trainer)
        say(f"resumed from {begin.path} at step {state.step}")
    if trainer.updates_once:
        say("one update a step: old log-probabilities are its own, exactly, and not recomputed")
    switch.give_to(trainer)
    freeze_garbage()
    ledger.restart()
    return Session(
        run=run,
        device=device,
        ledger=ledger,
        monitor=monitor,
        switch=switch,
        engine=engine,
        trainer=trainer,
        scorer=inputs.scorer,
        tenants=tenants,
        prompts=inputs.prompts,
        held_out=inputs.held_out,
        tokenizer=models.tokenizer,
        output_dir=output_dir,
        stop_signals=stop_signals,
        health=Health(
            output_dir,
            say,
            lambda: next(resume.valid_checkpoints(output_dir / "checkpoints"), None),
            begin.kept,
            state.skipped_in_a_row,
            state.flat_in_a_row,
        ),
        saved_step=begin.kept,
    )


def freeze_garbage() -> None:
    """A million objects of imported libraries are not worth a look at every hand-over."""
    gc.collect()
    gc.freeze()


def choose_start(run: Run, itemsize: int, output_dir: Path, pushes: int) -> Start:
    """Where the run goes on from; what it gives up for that is removed.

    Raises ConfigError, also where the disk has no room for what it will save.

    `itemsize`: of the engine's dtype. `pushes`: bytes that published versions take there.
    """
    start = resume.choose(run, output_dir, print)
    size = checkpoint_size(run, ModelShape.read(run.model), itemsize)
    kept = len(resume.steps_in(output_dir / "checkpoints"))
    check_disk_space(run, output_dir, room_needed(run, size, start.state.step, kept), pushes)
    resume.give_up(start.given_up)
    return start


def look_at_models(run: Run, inputs: Inputs, say: Callable[[str], None]) -> Models:
    """Makes built-in models. Raises ConfigError for what could not be built, or started, later."""
    check_schedule(run)
    path = resolve_model(replace(run.model, path=inputs.model_path), say)
    check_model(run, path)
    tokenizer = load_tokenizer(run.model, path)
    candidates: list[Candidate] = []
    for name in inputs.scorer.tenants:
        if name == "judge":
            candidates.append(find_judge(run, [*inputs.first, *inputs.held_out], say))
        else:
            candidates.append(find_reward_model(run, tokenizer, say))
    check_engine(policy_spec(run, path, Device.detect()), run.model.path)
    return Models(path=path, tokenizer=tokenizer, candidates=candidates)


def start_tenant(
    candidate: Candidate,
    switch: Switch,
    output_dir: Path,
    scratch: Path,
    say: Callable[[str], None],
    stack: ExitStack,
) -> RewardTenant:
    """Starts it on a device that nobody holds; it is the holder then, and `stack` closes it."""
    switch.vacate()
    tenant = candidate.start(switch.ledger, output_dir, scratch, say)
    stack.callback(tenant.close)
    switch.holder = tenant
    return tenant


def build_trainer(
    run: Run,
    inputs: Inputs,
    models: Models,
    ledger: Ledger,
    publisher: Publisher,
    block_size: int,
    say: Callable[[str], None],
) -> Trainer:
    """The trainer on a device that the engine has left."""
    device = ledger.device
    canary = canary_sequences(
        [prompt.token_ids for prompt in inputs.held_out or inputs.first],
        vocabulary=len(models.tokenizer),
        length=canary_length(run.max_model_len, block_size),
    )
    return Trainer(
        run,
        models.path,
        getattr(torch, engine_dtype(run.model.dtype, device)),
        models.tokenizer.pad_token_id,
        ledger,
        publisher,
        canary,
        say,
    )
