"""Alternate one accelerator between rollouts and policy updates.

trainer --publish v(k)--> rollout engine --rollouts--> rewards --scored groups--> trainer
   \\__________________ one accelerator, one holder at a time (the switch) _________________/
"""

from rlswitch import evaluation
from rlswitch.build import open_session
from rlswitch.evaluation import evaluate
from rlswitch.inputs import Inputs
from rlswitch.processes.signals import StopSignals
from rlswitch.report.page import write_report
from rlswitch.run import Run
from rlswitch.session import Session
from rlswitch.types import Group


def train(run: Run, inputs: Inputs, stop_signals: StopSignals) -> None:
    """Runs to `run.num_steps`, from the newest checkpoint if there is one."""
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
            batch = trainer.prepare(groups)  # rejects rollouts of another policy version
            batch.advantages, batch.returns = run.algorithm.estimate_advantages(batch, trainer.memory)
            metrics = trainer.update(batch)

            if evaluation.is_due(run.evaluation, trainer.version, run.num_steps):
                switch.give_to(engine, trainer.publish())  # stays awake for the next rollouts
                metrics |= evaluate(session)
            session.log(metrics, groups, batch)
            session.save_or_stop()  # a checkpoint if one is due; Preempted after a stop signal
    write_report(session.output_dir)


def collect(session: Session) -> list[Group]:
    """One step's groups, sampled from the current version and scored.

    Dynamic sampling (DAPO) replaces groups without a learning signal by those of further prompts, for as many
    rounds as the algorithm allows. Then the others fill up the step, whose size is fixed.
    """
    run = session.run
    rounds, wanted = run.algorithm.dynamic_sampling, run.rollout.num_prompts
    kept: list[Group] = []
    spare: list[Group] = []
    for again in range(1 + rounds):
        if again:
            session.switch.give_to(session.engine, session.trainer.publish())  # a judge may have it
        for group in sample(session, wanted - len(kept)):
            (kept if group.is_informative or not rounds else spare).append(group)
        if len(kept) == wanted:
            break
    return [*kept, *spare][:wanted]


def sample(session: Session, num_prompts: int) -> list[Group]:
    """The groups of the next `num_prompts` prompts, scored."""
    run = session.run
    sampling = run.sampling(run.rollout.group_size, step=session.trainer.version)
    with session.ledger.work("rollout"):
        groups = session.sampler.sample(session.engine, session.prompts.take(num_prompts), sampling)
    with session.ledger.work("reward"):  # functions in their processes, models in turn on the device
        session.rewards.score(groups, session.switch)
    return groups
