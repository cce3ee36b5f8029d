"""Alternate one accelerator between rollouts and policy updates.

trainer --publish v(k)--> rollout engine --rollouts--> rewards --scored groups--> trainer
   \\__________________ one accelerator, one holder at a time (the switch) _________________/
"""

from __future__ import annotations

from rlswitch import checkpoint, evaluation
from rlswitch.config import Run
from rlswitch.evaluation import evaluate
from rlswitch.report import write_report
from rlswitch.session import Session, open_session
from rlswitch.types import Group, Sampling


def train(run: Run) -> None:
    """Runs to `run.num_steps`, from the newest checkpoint when there is one."""
    if finished := checkpoint.finished(run):
        print(finished)
        return
    with open_session(run) as session:
        trainer, engine, switch = session.trainer, session.engine, session.switch
        if trainer.version == 0 and evaluation.is_due(run.evaluation, 0, run.num_steps):
            switch.give_to(engine, trainer.publish())
            session.log(evaluate(engine, session.held_out, session.scorer, run, session.ledger))

        while trainer.version < run.num_steps:
            session.ledger.step = trainer.version + 1
            switch.give_to(engine, trainer.publish())  # wake, reload, prove, reset the prefix cache
            groups = collect(session)

            switch.give_to(trainer)  # the engine sleeps, the trainer comes back
            batch = trainer.prepare(groups)  # refuses rollouts of another policy version
            run.algorithm.estimate_advantages(batch)
            metrics = trainer.update(batch)

            if evaluation.is_due(run.evaluation, trainer.version, run.num_steps):
                switch.give_to(engine, trainer.publish())  # stays awake for the next rollouts
                metrics |= evaluate(engine, session.held_out, session.scorer, run, session.ledger)
            session.log(metrics, groups, batch)
            if checkpoint.is_due(run.checkpoint, trainer.version, run.num_steps):
                session.save()
    write_report(session.output_dir)


def collect(session: Session) -> list[Group]:
    """One step's rollouts, sampled from the current version and scored."""
    run, trainer = session.run, session.trainer
    sampling = Sampling(
        num_samples=run.rollout.group_size,
        max_new_tokens=run.rollout.max_new_tokens,
        temperature=run.rollout.temperature,
        seed=run.seed,
        step=trainer.version,
    )
    with session.ledger.work("rollout"):
        groups = session.engine.generate(session.prompts.take(run.rollout.num_prompts), sampling)
    with session.ledger.work("reward"):
        session.scorer.score(groups)
    return groups
