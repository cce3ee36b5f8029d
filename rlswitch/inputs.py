"""Reads and checks files, rewards and prompts before anything starts; build.py checks the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial

from rlswitch.config.sections import ServerEngineConfig
from rlswitch.data.hub import (
    check_fits_context,
    check_is_causal_lm,
    check_model_path,
    load_tokenizer,
    read_config,
    resolve_model,
)
from rlswitch.data.prompts import Prompts, load_prompts, read_table, read_tables, sources_of
from rlswitch.data.rows import Source, Table, check_source, gather, task_of
from rlswitch.engines.vllm.address import choose_address
from rlswitch.errors import ConfigError
from rlswitch.processes.fork_server import prepare
from rlswitch.records.trackers import tracker_problems
from rlswitch.rewards.models.tenant import check_tenants
from rlswitch.rewards.rewards import Rewards
from rlswitch.rewards.workers.resolve import check_exists
from rlswitch.run import Run
from rlswitch.types import Prompt

NUM_FIRST = 8
MAX_BYTES = 1 << 26
"""check_inputs skips larger files: open_inputs reads them anyway, and twice would take seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What is read before anything is started."""

    model_path: str
    """run.model.path, downloaded if it is a hub id; a built-in model is made later."""
    prompts: Prompts
    held_out: list[Prompt]
    first: list[Prompt]
    """A few training prompts to check and measure with."""
    rewards: Rewards


def check_inputs(run: Run) -> None:
    """Raises ConfigError with every mistake that files, names and addresses show; imports no torch."""
    checks: list[Callable[[], object]] = [partial(check_model_path, *model) for model in _models_of(run)]
    checks += [partial(_check_rows, source, run.data.prompt_key) for source in sources_of(run)]
    checks += [partial(check_exists, entry) for entry in run.reward.functions]
    checks.append(partial(_check_trackers, run.logger))
    if isinstance(run.engine, ServerEngineConfig) and run.engine.url is None:
        checks.append(partial(choose_address, run.engine.listen, ""))
    gather(checks)


@contextmanager
def open_inputs(run: Run, log: Callable[[str], None]) -> Iterator[Inputs]:
    """Reads rows and starts the rewards, then imports torch for the tokenizer. Raises ConfigError.

    Leaves nothing behind but caches.
    """
    tables = read_tables(run)
    model_path = run.model.path if task_of(run.model.path) else resolve_model(run.model, log)
    step_size = run.rollout.num_prompts * run.rollout.group_size
    rewards = Rewards(run.reward, step_size=step_size, max_new_tokens=run.rollout.max_new_tokens)
    with closing(rewards):
        for table in tables if run.evaluation.every else tables[:1]:
            rewards.check_columns([name for name in table.rows[0] if name != run.data.prompt_key])
        if run.engine.fork_server and not (isinstance(run.engine, ServerEngineConfig) and run.engine.url):
            prepare()  # imports vLLM while this process imports torch
        prompts, held_out = tokenize(run, tables, model_path, log)
        first = prompts.take(NUM_FIRST)
        check_tenants(run, [*first, *held_out])
        yield Inputs(model_path=model_path, prompts=prompts, held_out=held_out, first=first, rewards=rewards)


def tokenize(
    run: Run, tables: Sequence[Table], model_path: str, log: Callable[[str], None]
) -> tuple[Prompts, list[Prompt]]:
    """Training and held-out prompts. Raises ConfigError if they do not suit the model."""
    if task := task_of(model_path):
        tokenizer = task.build_tokenizer()
    else:
        config = read_config(run.model, model_path)
        check_is_causal_lm(run.model, config)
        check_fits_context(run, config)
        tokenizer = load_tokenizer(run.model, model_path)
    return load_prompts(run, tables, tokenizer, log)


def _models_of(run: Run) -> Iterator[tuple[str, str]]:
    """The settings that name a model which the run needs, and their values."""
    yield "model.path", run.model.path
    for name, settings in run.tenants.items():
        if settings.path is not None:
            yield f"{name}.path", settings.path


def _check_rows(source: Source, prompt_key: str) -> None:
    check_source(source)
    if source.is_text and source.file.stat().st_size <= MAX_BYTES:
        read_table(source, prompt_key)


def _check_trackers(names: Sequence[str]) -> None:
    if problems := tracker_problems(names):
        raise ConfigError(*problems)
