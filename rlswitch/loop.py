"""Alternate one accelerator between rollouts and policy updates.

trainer --publish v(k)--> rollout engine --rollouts--> rewards --scored groups--> trainer
   \\__________________ one accelerator, one holder at a time (the switch) _________________/
"""

from __future__ import annotations

from rlswitch import evaluation
from rlswitch.checkpoint import checkpoint
from rlswitch.errors import Preempted
from rlswitch.evaluation import evaluate
from rlswitch.inputs import Inputs
from rlswitch.processes.signals import StopSignals
from rlswitch.report.page import write_report
from rlswitch.rewards.models.tenant import ask_in_turn
from rlswitch.rewards.shaping import punish_overlong
from rlswitch.run import Run
from rlswitch.session import Session, open_session
from rlswitch.types import Group


def train(run: Run, inputs: Inputs, stop_signals: StopSignals) -> None:
    """Runs to `run.num_steps`, from the newest checkpoint when there is one."""
    with open_session(run, inputs, stop_signals) as session:
        trainer, engine, switch = session.trainer, session.engine, session.switch
        if trainer.version == 0 and evaluation.is_due(run.evaluation, 0, run.num_steps):
            switch.give_to(engine, trainer.publish())
            session.log(evaluate(session))

        while trainer.version < run.num_steps:
            session.ledger.step = trainer.version + 1
            switch.give_to(engine, trainer.publish())  # wake, reload, prove, reset the prefix cache
            with session.abandonable():  # a stop signal need not wait for rollouts
                groups = collect(session)

            switch.give_to(trainer)  # the engine, or a judge, sleeps; the trainer comes back
            batch = trainer.prepare(groups)  # refuses rollouts of another policy version
            run.algorithm.estimate_advantages(batch, trainer.memory)
            metrics = trainer.update(batch)

            if evaluation.is_due(run.evaluation, trainer.version, run.num_steps):
                switch.give_to(engine, trainer.publish())  # stays awake for the next rollouts
                metrics |= evaluate(session)
            session.log(metrics, groups, batch)
            if checkpoint.is_due(run.checkpoint, trainer.version, run.num_steps) or session.stop_signals:
                session.save()
            if session.stop_signals and trainer.version < run.num_steps:
                raise Preempted(
                    f"stopped by {session.stop_signals.names[0]} after step {trainer.version}, checkpoint"
                    f" saved; {session.how_to_go_on} to go on"
                )
    write_report(session.output_dir)


def collect(session: Session) -> list[Group]:
    """One step's groups, sampled from the current version and scored.

    With dynamic sampling (DAPO) groups without a learning signal make room for further prompts, for as
    many rounds as the algorithm allows; then they fill up what is missing, so a step has a fixed size.
    """
    run = session.run
    kept: list[Group] = []
    spare: list[Group] = []
    for again in range(1 + run.algorithm.dynamic_sampling):
        if again:
            session.switch.give_to(session.engine, session.trainer.publish())  # a judge may have it
        groups = sample(session, run.rollout.num_prompts - len(kept))
        for group in groups:
            (kept if group.is_informative or not run.algorithm.dynamic_sampling else spare).append(group)
        if len(kept) == run.rollout.num_prompts:
            break
    return [*kept, *spare][: run.rollout.num_prompts]


def sample(session: Session, num_prompts: int) -> list[Group]:
    """The next `num_prompts` prompts' groups, with their rewards."""
    run = session.run
    sampling = run.sampling(run.rollout.group_size, step=session.trainer.version)
    with session.ledger.work("rollout"):
        groups = session.engine.generate(session.prompts.take(num_prompts), sampling)
    with session.ledger.work("reward"):
        is_refill = num_prompts < run.rollout.num_prompts
        pending = session.scorer.submit(groups, is_refill)  # functions, in processes of their own
        ask_in_turn(session.tenants, pending, session.switch)  # judge, reward model: the engine sleeps
        session.scorer.collect(pending)
        if run.reward.overlong_buffer:
            punish_overlong(groups, run.rollout.max_new_tokens, run.reward.overlong_buffer)
    return groups
