"""What a run is given, read and refused before torch is imported: files, addresses, prompts and rewards.

What only the model itself can tell is left to session.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rlswitch.command.torchless import Torchless
from rlswitch.config.sections import TENANTS, ServerEngineConfig
from rlswitch.data.builtin import refuse_unknown_task, task_of
from rlswitch.data.hub import (
    load_tokenizer,
    read_config,
    refuse_longer_than_context,
    refuse_mute,
    resolve_model,
)
from rlswitch.data.prompts import Prompts, load_prompts, read_tables, refuse_bad_rows, sources_of
from rlswitch.data.rows import HUB_ID, Source, Table, nearest_file, read, reason, refuse_missing
from rlswitch.engines.vllm.address import free_port
from rlswitch.errors import ConfigError
from rlswitch.records.trackers import tracker_problems
from rlswitch.rewards.models.checks import refuse_unfit_tenants
from rlswitch.rewards.scorer import Scorer
from rlswitch.rewards.workers.resolve import refuse_missing as refuse_missing_function
from rlswitch.run import Run
from rlswitch.types import Prompt

FIRST = 8
"""So many training prompts are looked at before the first step."""

GLANCE_BYTES = 1 << 26
"""A larger file of rows is read once, by open_inputs: reading it twice would take seconds."""
HEADER_BYTES = 100_000_000
"""What safetensors allows for the header of a file."""
PICKLES = ("*.bin", "*.pt", "*.pth")
TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
"""Without any of them transformers makes an empty one, to which every prompt is empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What was read before anything is started."""

    model_path: str
    """run.model.path, downloaded where it is a hub id; a built-in model has yet to be made."""
    prompts: Prompts
    held_out: list[Prompt]
    first: list[Prompt]
    """A look at the training prompts."""
    scorer: Scorer


@contextmanager
def open_inputs(run: Run, torchless: Torchless, say: Callable[[str], None]) -> Iterator[Inputs]:
    """Rewards, prompts and the model's directory. Raises ConfigError; leaves nothing behind but caches."""
    with ExitStack() as stack:
        yield read_inputs(run, torchless, say, stack)


def read_inputs(run: Run, torchless: Torchless, say: Callable[[str], None], stack: ExitStack) -> Inputs:
    """Rows while the other process imports, then prompts; `stack` closes the rewards."""
    tables = read_tables(run)
    model_path = run.model.path if task_of(run.model.path) else resolve_model(run.model, say)
    answer = torchless.ask(tokenize, run, tables, model_path, say)
    scorer = build_scorer(run)
    stack.callback(scorer.close)
    prompts, held_out, first = answer()
    scorer.check(first)
    if held_out and run.evaluation.every:  # they may lack a column that the others have
        scorer.check(held_out)
    return Inputs(model_path=model_path, prompts=prompts, held_out=held_out, first=first, scorer=scorer)


def tokenize(
    run: Run, tables: Sequence[Table], model_path: str, say: Callable[[str], None]
) -> tuple[Prompts, list[Prompt], list[Prompt]]:
    """All prompts, the held-out ones, and the first; raises ConfigError for models that they do not suit."""
    if task := task_of(model_path):
        tokenizer = task.build_tokenizer()
    else:
        config = read_config(run.model, model_path)
        refuse_mute(run.model, config)
        refuse_longer_than_context(run, config)
        tokenizer = load_tokenizer(run.model, model_path)
    prompts, held_out = load_prompts(run, tables, tokenizer, say)
    first = prompts.take(FIRST)
    refuse_unfit_tenants(run, [*first, *held_out])
    return prompts, held_out, first


def build_scorer(run: Run) -> Scorer:
    """The rewards, and a look at the trackers: both can be told wrong at once."""
    problems = tracker_problems(run.logger)
    try:
        scorer = Scorer(run.reward, step_size=run.rollout.num_prompts * run.rollout.group_size)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return scorer


def refuse_wrong_inputs(run: Run) -> None:
    """Raises ConfigError with all that can be told at once."""
    if wrong := list(dict.fromkeys(input_problems(run))):  # two splits of one source can say the same
        raise ConfigError(*wrong)


def input_problems(run: Run) -> Iterator[str]:
    looks: list[Callable[[], object]] = [
        partial(_refuse_unfit_directory, key, path) for key, path in _models_of(run)
    ]
    looks += [partial(_glance, source, run.data.prompt_key) for source in sources_of(run)]
    looks += [partial(refuse_missing_function, entry) for entry in run.reward.functions]
    if isinstance(run.engine, ServerEngineConfig) and run.engine.is_started_here:
        looks.append(partial(free_port, run.engine.listen))
    for look in looks:
        try:
            look()
        except ConfigError as error:
            yield from error.problems


def _models_of(run: Run) -> Iterator[tuple[str, str]]:
    """Settings that name a model which the run needs, and what they name."""
    yield "model.path", run.model.path
    for name in TENANTS:
        path = getattr(run, name).path
        if name in run.reward.functions and path is not None:
            yield f"{name}.path", path


def _glance(source: Source, prompt_key: str) -> None:
    refuse_missing(source)
    if source.is_text and source.file.stat().st_size <= GLANCE_BYTES:
        refuse_bad_rows(read(source), prompt_key)


def _refuse_unfit_directory(key: str, path: str) -> None:
    """Raises ConfigError where `path`, the value of `key`, is no place for a model, or is not whole."""
    refuse_unknown_task(key, path)
    folder = Path(path)
    if os.path.isdir(folder):
        fault = _directory_fault(folder)
    elif os.path.exists(folder):
        fault = "is a file; set the directory that it lies in"
    elif HUB_ID.fullmatch(path) or path.startswith("builtin:"):
        return
    else:
        fault = f"no such directory, and not a hub id (name or owner/name){nearest_file(folder)}"
    if fault:
        raise ConfigError(f"{key} = {path}: {fault}")


def _directory_fault(folder: Path) -> str:
    """What a model directory lacks, or nothing. Of the weights the headers are read alone."""
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        what = "it holds a LoRA adapter" if adapter else "no model is saved there"
        return f"has no config.json: {what}; set the directory of a whole model"
    try:
        json.loads((folder / "config.json").read_text())
        index = folder / "model.safetensors.index.json"
        parts = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"its JSON files cannot be read ({reason(error)}); copy the model again"
    if not any(path for pattern in TOKENIZERS for path in folder.glob(pattern)):
        return "has no tokenizer; save it beside the weights with save_pretrained"
    files = sorted(folder.glob("*.safetensors"))
    if missing := sorted(parts - {file.name for file in files}):
        return f"has no {missing[0]}, which its index names; copy the model again"
    if not files:
        pickles = [file.name for pattern in PICKLES for file in folder.glob(pattern)]
        other = f" but {pickles[0]}, a pickle, which could run code while it loads" if pickles else ""
        return f"has no *.safetensors{other}; save the model with save_pretrained"
    faults = (f"{file.name} {fault}; copy it again" for file in files if (fault := _weights_fault(file)))
    return next(faults, "")


def _weights_fault(file: Path) -> str:
    """Whether a safetensors file is as long as its header says."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= min(size - 8, HEADER_BYTES):
                return f"is no safetensors file, or cut off: its header would have {length} of {size} bytes"
            header = json.loads(stream.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"cannot be read as safetensors ({reason(error)})"
    return "" if size == expected else f"has {size} bytes instead of {expected}"
