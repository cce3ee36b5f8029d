"""The optimizer, and the learning rate over a run: transformers' schedules by name."""

import inspect

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from rlswitch.config.sections import TrainerConfig
from rlswitch.errors import ConfigError
from rlswitch.run import Run

OURS = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
"""Arguments of a schedule that the run decides."""


def build_optimizer(config: TrainerConfig, policy: nn.Module, critic: nn.Module | None) -> Optimizer:
    groups = [{"params": trained(policy), "lr": config.lr}]
    if critic is not None:
        groups.append({"params": trained(critic), "lr": config.critic_lr})
    return torch.optim.AdamW(
        groups,
        lr=config.lr,  # an absolute min_lr of a schedule is relative to this
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def build_schedule(run: Run, optimizer: Optimizer) -> LambdaLR:
    """The schedule named by trainer.lr_schedule, in optimizer steps. Raises ConfigError."""
    config = run.trainer
    name = {"constant": "constant_with_warmup"}.get(config.lr_schedule, config.lr_schedule)
    build = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    takes = inspect.signature(build).parameters
    given = {"num_warmup_steps": config.warmup_steps}
    if "num_training_steps" in takes:
        given["num_training_steps"] = run.num_steps * config.epochs * config.minibatches
    free = [key for key in takes if key not in OURS]
    for key in config.lr_schedule_kwargs:
        if key not in free:
            raise ConfigError(
                f"trainer.lr_schedule_kwargs.{key}: the schedule {config.lr_schedule} does not take it; it"
                f" takes {', '.join(free) or 'nothing'}"
            )
    try:
        return build(optimizer, **given, **config.lr_schedule_kwargs)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"trainer.lr_schedule = {config.lr_schedule}: {error}; set its arguments in"
            f" trainer.lr_schedule_kwargs ({', '.join(free)})"
        ) from error


def resume_schedule(schedule: LambdaLR, steps: int) -> None:
    """Advances a fresh schedule by `steps` optimizer steps, and sets its optimizer's rates.

    Rates are recomputed, not restored: a run resumed with more steps or another rate follows the new curve.
    """
    schedule.last_epoch, schedule._step_count = steps, steps + 1
    schedule._last_lr = [
        base * rate(steps) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = rate


def check_schedule(run: Run) -> None:
    """Raises ConfigError if the schedule cannot be built, before anything is loaded."""
    build_schedule(run, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=run.trainer.lr))
