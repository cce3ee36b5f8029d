"""mode=rewards: scores the dataset's own answers and samples of the base model, and trains nothing.

It writes no files. A reward that gives the reference answers less than full marks is better found here.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from rlswitch.build import Models, inspect_models, start_tenants
from rlswitch.engines.start import start_engine
from rlswitch.errors import EngineError
from rlswitch.inputs import Inputs
from rlswitch.planning.policy import policy_spec
from rlswitch.rewards.rewards import Rewards
from rlswitch.run import Run
from rlswitch.switch.device import Device
from rlswitch.switch.ledger import Ledger
from rlswitch.switch.switch import Switch
from rlswitch.text import first_line, prompt_text
from rlswitch.types import Group, Prompt, Rollout

ANSWER_COLUMNS = ("answer", "solution", "completion")
GOLD, SAMPLED, SAMPLES = 64, 4, 2
"""Rows whose reference answer is scored; rows that the model answers, and how often each."""


def show(run: Run, inputs: Inputs) -> None:
    """Prints how the rewards score gold answers and a few samples; trains nothing."""
    models = inspect_models(run, inputs)
    console = Console(highlight=False)
    prompts = inputs.held_out or inputs.first
    scored = {"gold answers": gold(prompts[:GOLD], models.tokenizer)}
    if not scored["gold answers"]:
        console.print(f"no gold answers: the dataset has none of the columns {', '.join(ANSWER_COLUMNS)}")
    with tempfile.TemporaryDirectory(prefix="rlswitch-preview-") as name, ExitStack() as stack:
        directory = Path(name)
        switch = Switch(Ledger(Device.detect(), directory))
        try:
            scored["the model's"] = sample(run, models, prompts[:SAMPLED], switch.ledger, directory)
        except EngineError as error:
            console.print(f"no samples of the model: {first_line(error)}")
        started = start_tenants(models.tenants, switch, directory, directory, print, stack)
        inputs.rewards.tenants, _ = started
        for groups in scored.values():
            inputs.rewards.score(groups, switch, strict=True)
    for part in render(scored, inputs.rewards):
        console.print(part)


def gold(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> list[Group]:
    """Each row's own answer as its completion."""
    groups = []
    for prompt in prompts:
        answers = [prompt.columns[name] for name in ANSWER_COLUMNS if prompt.columns.get(name) is not None]
        if answers:
            text = str(answers[0])
            token_ids = tokenizer.encode(text, add_special_tokens=False)
            rollout = Rollout(
                prompt=prompt,
                sample=0,
                token_ids=token_ids,
                logprobs=[0.0] * len(token_ids),
                text=text,
                finish_reason="stop",
                policy_version=0,
            )
            groups.append(Group(prompt=prompt, rollouts=[rollout]))
    return groups


def sample(
    run: Run, models: Models, prompts: Sequence[Prompt], ledger: Ledger, directory: Path
) -> list[Group]:
    """A few completions by the checkpoint as it is, from the real engine, which is ended again.

    Raises EngineError when it cannot be started.
    """
    # it generates once, unproven
    spec = replace(policy_spec(run, models.path, ledger.device), verify="off")
    where = (ledger, directory / "engine.log", directory)
    with closing(start_engine(spec, models.tokenizer, *where, frozen=True)) as engine:
        return engine.generate(prompts, run.sampling(SAMPLES, step=0))


def render(scored: dict[str, list[Group]], rewards: Rewards) -> Iterator[RenderableType]:
    """A table of means, lowest and highest by function, and every sample with its rewards."""
    table = Table("rewards", box=box.SIMPLE)
    for heading in ("of", "rollouts", "errors", "mean", "lowest", "highest"):
        table.add_column(heading, justify="left" if heading == "of" else "right")
    for source, groups in scored.items():
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        failed = [rollout for group in groups for rollout in group.failed]
        for name in rewards.names if rollouts else ():
            given = [rollout.rewards[name] for rollout in rollouts if name in rollout.rewards]
            numbers = [fmean(given), min(given), max(given)] if given else []
            errors = sum(name in rollout.errors for rollout in failed)
            cells = [f"{number:.3f}" for number in numbers]
            table.add_row(name, source, str(len(rollouts) + len(failed)), str(errors), *cells)
    yield table
    samples = Table("prompt", "completion", *rewards.names, box=box.SIMPLE)
    for rollout in (it for group in scored.get("the model's", []) for it in group.rollouts):
        scores = [f"{rollout.rewards[it]:.3f}" if it in rollout.rewards else "" for it in rewards.names]
        samples.add_row(prompt_text(rollout.prompt.messages)[-80:], rollout.text[-80:], *scores)
    if samples.rows:
        yield samples
