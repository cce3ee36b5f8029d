"""Builds a run in the order that the device demands: each tenant starts while no other has the device.

claim the run directory -> start the rollout engine and the models among the rewards -> build the trainer
"""

import gc
from collections.abc import Callable, Iterator, Mapping
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
from rlswitch.engines.spec import engine_dtype
from rlswitch.engines.start import check_engine, start_engine
from rlswitch.inputs import Inputs
from rlswitch.planning.footprint import ModelShape
from rlswitch.planning.plan import level_of
from rlswitch.planning.policy import policy_spec
from rlswitch.processes.signals import StopSignals, leave_at_second_interrupt
from rlswitch.proof.canary import canary_length, canary_sequences, canary_start
from rlswitch.proof.fingerprint import checkpoint_elements
from rlswitch.records.health import Health
from rlswitch.records.monitor import Monitor
from rlswitch.rewards.models.tenant import RewardTenant, StartTenant, prepare_tenants
from rlswitch.rollouts.sampler import SingleTurn
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
    tenants: dict[str, StartTenant]
    """The models among the rewards."""


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
    models = inspect_models(run, inputs)
    run = replace(run, switch=replace(run.switch, level=level_of(run)))  # auto: decided here
    assert run.output_dir is not None, "the command line names it"
    output_dir, device = Path(run.output_dir), Device.detect()
    start, monitor, publisher = claim(run, models.path, output_dir, device, stack)
    ledger = Ledger(device, output_dir, start.kept, start.state.step)
    ledger.on_phase = monitor.phase
    inputs.prompts.seek(start.state.cursor)
    inputs.rewards.log = log = monitor.log_line

    monitor.phase("engine start")
    spec, engine_log = policy_spec(run, models.path, device), output_dir / "engine.log"
    engine = start_engine(spec, models.tokenizer, ledger, engine_log, publisher.root, log=log)
    stack.callback(engine.close)
    switch = Switch(ledger, holder=engine)
    tenants, peak_bytes = start_tenants(models.tenants, switch, output_dir, publisher.root, log, stack)
    inputs.rewards.tenants = tenants

    monitor.phase("trainer start")
    canary_tokens = canary_length(run.max_model_len, engine.backend.block_size)
    trainer = start_trainer(run, inputs, models, start, ledger, publisher, canary_tokens, log)
    trainer.parking.engine_bytes = peak_bytes
    switch.give_to(trainer)
    gc.collect()
    gc.freeze()  # a million objects of imported libraries need not be visited at every hand-over
    ledger.restart()
    return Session(
        run=run,
        ledger=ledger,
        monitor=monitor,
        switch=switch,
        engine=engine,
        sampler=SingleTurn(),
        trainer=trainer,
        rewards=inputs.rewards,
        prompts=inputs.prompts,
        held_out=inputs.held_out,
        tokenizer=models.tokenizer,
        output_dir=output_dir,
        stop_signals=stop_signals,
        health=start_health(output_dir, start, log),
        saved_step=start.kept,
    )


def inspect_models(run: Run, inputs: Inputs) -> Models:
    """Makes or downloads the models. Raises ConfigError for what could not be built or started later."""
    check_schedule(run)
    path = resolve_model(replace(run.model, path=inputs.model_path), print)
    check_model(run, path)
    tokenizer = load_tokenizer(run.model, path)
    tenants = prepare_tenants(run, [*inputs.first, *inputs.held_out], tokenizer, print)
    check_engine(policy_spec(run, path, Device.detect()), run.model.path)
    return Models(path=path, tokenizer=tokenizer, tenants=tenants)


def claim(
    run: Run, model_path: str, output_dir: Path, device: Device, stack: ExitStack
) -> tuple[Start, Monitor, Publisher]:
    """Locks the run directory and decides where the run starts; `stack` releases it.

    Raises ConfigError when another run has it, when `resume` names no valid checkpoint, or when the disk is
    too full for what the run will save.
    """
    itemsize = getattr(torch, engine_dtype(run.model.dtype, device)).itemsize
    nbytes = itemsize * checkpoint_elements(Path(model_path))
    pushed_here = choose_directory(run.switch.transport, nbytes, output_dir) == output_dir
    pushes = 2 * nbytes if pushed_here else 0
    stack.enter_context(only_run_in(output_dir, print))
    start = resume.choose(run, output_dir, print)
    size = checkpoint_size(run, ModelShape.read(run.model), itemsize)
    kept = len(resume.steps_in(output_dir / "checkpoints"))
    check_disk_space(run, output_dir, room_needed(run, size, start.state.step, kept), pushes)
    resume.give_up(start.given_up)  # checkpoints after the one it resumes from
    monitor = stack.enter_context(Monitor(run, output_dir, start.kept, start.state.wandb_id))
    publisher = Publisher(run.switch.transport, nbytes, output_dir)
    stack.callback(publisher.close)
    return start, monitor, publisher


def start_tenants(
    tenants: Mapping[str, StartTenant],
    switch: Switch,
    output_dir: Path,
    scratch: Path,
    log: Callable[[str], None],
    stack: ExitStack,
) -> tuple[list[RewardTenant], int]:
    """Starts the models among the rewards one by one and leaves the device free; `stack` closes them.

    Also the most device memory in use meanwhile, CUDA graphs, workspaces and the engine's included.
    """
    device, started = switch.ledger.device, []
    peak_bytes = device.total_bytes() - device.free_bytes()
    for name, start in tenants.items():
        switch.ledger.on_phase(f"{name} start")
        switch.vacate()
        tenant = start(switch.ledger, output_dir, scratch, log)
        stack.callback(tenant.close)
        switch.holder = tenant
        started.append(tenant)
        peak_bytes = max(peak_bytes, device.total_bytes() - device.free_bytes())
    switch.vacate()
    return started, peak_bytes


def start_trainer(
    run: Run,
    inputs: Inputs,
    models: Models,
    start: Start,
    ledger: Ledger,
    publisher: Publisher,
    canary_tokens: int,
    log: Callable[[str], None],
) -> Trainer:
    """The trainer, restored from the checkpoint that the run resumes from."""
    prompts = [prompt.token_ids for prompt in inputs.held_out or inputs.first]
    trainer = Trainer(
        run,
        models.path,
        getattr(torch, engine_dtype(run.model.dtype, ledger.device)),
        models.tokenizer.pad_token_id,
        ledger,
        publisher,
        canary_sequences(prompts, len(models.tokenizer), canary_tokens, canary_start(models.tokenizer)),
        log,
    )
    if start.path:
        checkpoint.restore(start.path, trainer)
        log(f"resumed from {start.path} at step {start.state.step}")
    if trainer.updates_once:
        log("one update a step: its own log-probabilities serve as the old ones and are not recomputed")
    return trainer


def start_health(output_dir: Path, start: Start, log: Callable[[str], None]) -> Health:
    return Health(
        output_dir,
        log,
        lambda: next(resume.valid_checkpoints(output_dir / "checkpoints"), None),
        start.kept,
        start.state.skipped_in_a_row,
        start.state.flat_in_a_row,
    )
