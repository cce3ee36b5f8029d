"""Builds a run in the order that the device demands: each tenant starts while no other has the device.

claim the run directory -> start the rollout engine and the models among the rewards -> build the trainer
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from rlswitch.checkpoint import checkpoint, resume
from rlswitch.checkpoint.resume import Start
from rlswitch.checkpoint.run_directory import check_disk_space, checkpoint_size, only_run_in, room_needed
from rlswitch.data.hub import load_tokenizer, resolve_model
from rlswitch.engines.revival import RestartingEngine
from rlswitch.engines.spec import engine_dtype
from rlswitch.engines.start import check_engine, start_engine
from rlswitch.inputs import Inputs
from rlswitch.planning.footprint import ModelShape
from rlswitch.planning.plan import level_of
from rlswitch.planning.policy import policy_spec
from rlswitch.processes.signals import StopSignals, leave_at_second_interrupt
from rlswitch.proof.canary import canary_length, canary_sequences
from rlswitch.proof.fingerprint import checkpoint_elements
from rlswitch.records.health import Health
from rlswitch.records.monitor import Monitor
from rlswitch.rewards.models.tenant import PreparedTenant, RewardTenant, prepare_tenants
from rlswitch.rewards.rewards import Rewards
from rlswitch.run import Run
from rlswitch.session import Session
from rlswitch.switch.device import Device
from rlswitch.switch.ledger import Ledger
from rlswitch.switch.switch import Switch
from rlswitch.training.models import check_model
from rlswitch.training.publish import Publisher, choose_directory
from rlswitch.training.schedule import check_schedule
from rlswitch.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class Models:
    """The models of a run, validated and not loaded."""

    path: str
    """The policy's directory."""
    tokenizer: PreTrainedTokenizerBase
    tenants: list[PreparedTenant]
    """The models among the rewards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """The run directory, owned by this process, and what writes into it."""

    output_dir: Path
    start: Start
    monitor: Monitor
    ledger: Ledger
    publisher: Publisher


@dataclass(frozen=True, kw_only=True, slots=True)
class Tenants:
    """The rollout engine and the models among the rewards, all of them asleep."""

    engine: RestartingEngine
    scoring: list[RewardTenant]
    switch: Switch
    peak_bytes: int
    """The most device memory in use while one of them was awake, CUDA graphs and workspaces included."""


@contextmanager
def open_session(run: Run, inputs: Inputs, stop_signals: StopSignals) -> Iterator[Session]:
    """Builds a run and closes it. A stop signal interrupts the building, not the closing."""
    disable_progress_bar()
    with ExitStack() as stack:
        leave_at_second_interrupt(stack)
        with stop_signals.abandoning():
            session = build(run, inputs, stop_signals, stack)
        yield session


def build(run: Run, inputs: Inputs, stop_signals: StopSignals, stack: ExitStack) -> Session:
    """All parts of a run, with the trainer holding the device; `stack` closes them."""
    models = inspect_models(run, inputs, print)
    run = replace(run, switch=replace(run.switch, level=level_of(run)))  # auto: decided here
    claimed = claim(run, models, stack)
    inputs.prompts.seek(claimed.start.state.cursor)
    inputs.scorer.log = claimed.monitor.log_line
    tenants = start_tenants(run, models, claimed, stack)
    trainer = start_trainer(run, inputs, models, claimed, tenants)
    gc.collect()
    gc.freeze()  # a million objects of imported libraries need not be visited at every hand-over
    claimed.ledger.restart()
    return Session(
        run=run,
        ledger=claimed.ledger,
        monitor=claimed.monitor,
        switch=tenants.switch,
        engine=tenants.engine,
        trainer=trainer,
        rewards=Rewards(inputs.scorer, tenants.scoring),
        prompts=inputs.prompts,
        held_out=inputs.held_out,
        tokenizer=models.tokenizer,
        output_dir=claimed.output_dir,
        stop_signals=stop_signals,
        health=Health(
            claimed.output_dir,
            claimed.monitor.log_line,
            lambda: next(resume.valid_checkpoints(claimed.output_dir / "checkpoints"), None),
            claimed.start.kept,
            claimed.start.state.skipped_in_a_row,
            claimed.start.state.flat_in_a_row,
        ),
        saved_step=claimed.start.kept,
    )


def inspect_models(run: Run, inputs: Inputs, log: Callable[[str], None]) -> Models:
    """Makes or downloads the models. Raises ConfigError for what could not be built or started later."""
    check_schedule(run)
    path = resolve_model(replace(run.model, path=inputs.model_path), log)
    check_model(run, path)
    tokenizer = load_tokenizer(run.model, path)
    tenants = prepare_tenants(run, [*inputs.first, *inputs.held_out], tokenizer, log)
    check_engine(policy_spec(run, path, Device.detect()), run.model.path)
    return Models(path=path, tokenizer=tokenizer, tenants=tenants)


# -- 1. the run directory ------------------------------------------------------------------------


def claim(run: Run, models: Models, stack: ExitStack) -> Claim:
    """Locks the run directory and decides where the run starts; `stack` releases it.

    Raises ConfigError when another run has it, when `resume` names no valid checkpoint, or when the disk is
    too full for what the run will save.
    """
    assert run.output_dir is not None, "the command line names it"
    output_dir, device = Path(run.output_dir), Device.detect()
    itemsize = getattr(torch, engine_dtype(run.model.dtype, device)).itemsize
    nbytes = itemsize * checkpoint_elements(Path(models.path))
    pushed_here = choose_directory(run.switch.transport, nbytes, output_dir) == output_dir
    stack.enter_context(only_run_in(output_dir, print))
    start = resume.choose(run, output_dir, print)
    size = checkpoint_size(run, ModelShape.read(run.model), itemsize)
    kept = len(resume.steps_in(output_dir / "checkpoints"))
    pushes = 2 * nbytes if pushed_here else 0
    check_disk_space(run, output_dir, room_needed(run, size, start.state.step, kept), pushes)
    resume.give_up(start.given_up)  # checkpoints after the one it resumes from
    monitor = stack.enter_context(Monitor(run, output_dir, start.kept, start.state.wandb_id))
    ledger = Ledger(device, output_dir, start.kept, start.state.step)
    ledger.on_phase = monitor.phase
    publisher = Publisher(run.switch.transport, nbytes, output_dir)
    stack.callback(publisher.close)
    return Claim(output_dir=output_dir, start=start, monitor=monitor, ledger=ledger, publisher=publisher)


# -- 2. what takes turns with the trainer --------------------------------------------------------


def start_tenants(run: Run, models: Models, claimed: Claim, stack: ExitStack) -> Tenants:
    """Starts the rollout engine and the models among the rewards, one by one; `stack` closes them."""
    ledger, device, scratch = claimed.ledger, claimed.ledger.device, claimed.publisher.root
    log = claimed.monitor.log_line
    claimed.monitor.phase("engine start")
    spec = policy_spec(run, models.path, device)
    engine_log = claimed.output_dir / "engine.log"
    engine = start_engine(spec, models.tokenizer, ledger, engine_log, scratch, log=log)
    stack.callback(engine.close)
    switch = Switch(ledger, holder=engine)
    taken = [device.total_bytes() - device.free_bytes()]
    scoring = []
    for prepared in models.tenants:
        claimed.monitor.phase(f"{prepared.name} start")
        scoring.append(start_tenant(prepared, switch, claimed.output_dir, scratch, log, stack))
        taken.append(device.total_bytes() - device.free_bytes())
    switch.vacate()
    return Tenants(engine=engine, scoring=scoring, switch=switch, peak_bytes=max(taken))


def start_tenant(
    prepared: PreparedTenant,
    switch: Switch,
    output_dir: Path,
    scratch: Path,
    log: Callable[[str], None],
    stack: ExitStack,
) -> RewardTenant:
    """Starts a tenant on the free device, which it then holds; `stack` closes it."""
    switch.vacate()
    tenant = prepared.start(switch.ledger, output_dir, scratch, log)
    stack.callback(tenant.close)
    switch.holder = tenant
    return tenant


# -- 3. the trainer ------------------------------------------------------------------------------


def start_trainer(run: Run, inputs: Inputs, models: Models, claimed: Claim, tenants: Tenants) -> Trainer:
    """The trainer, which gets the device, restored from the checkpoint that the run resumes from."""
    start, device, log = claimed.start, claimed.ledger.device, claimed.monitor.log_line
    claimed.monitor.phase("trainer start")
    canary = canary_sequences(
        [prompt.token_ids for prompt in inputs.held_out or inputs.first],
        vocabulary=len(models.tokenizer),
        length=canary_length(run.max_model_len, tenants.engine.backend.block_size),
    )
    trainer = Trainer(
        run,
        models.path,
        getattr(torch, engine_dtype(run.model.dtype, device)),
        models.tokenizer.pad_token_id,
        claimed.ledger,
        claimed.publisher,
        canary,
        log,
    )
    trainer.parking.engine_bytes = tenants.peak_bytes
    if start.path:
        checkpoint.restore(start.path, trainer)
        log(f"resumed from {start.path} at step {start.state.step}")
    if trainer.updates_once:
        log("one update a step: its own log-probabilities serve as the old ones and are not recomputed")
    tenants.switch.give_to(trainer)
    return trainer
