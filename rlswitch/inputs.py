"""What is wrong with the files and addresses that a run names, told before torch is imported.

A glance: what needs a tokenizer, the hub or a reward function's own code, load_inputs finds out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from rlswitch.config import Run, ServerEngineConfig
from rlswitch.data import refuse_bad_rows, sources_of
from rlswitch.engines.address import free_port
from rlswitch.rewards import TENANTS
from rlswitch.rewards.resolve import refuse_missing as refuse_missing_function
from rlswitch.sources import HUB_ID, Source, nearest_file, read, reason, refuse_missing
from rlswitch.tasks import refuse_unknown_task
from rlswitch.types import ConfigError

GLANCE_BYTES = 1 << 26
"""A larger file of rows is read once, by load_prompts: reading it twice would take seconds."""
HEADER_BYTES = 100_000_000
"""What safetensors allows for the header of a file."""
PICKLES = ("*.bin", "*.pt", "*.pth")
TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
"""Without any of them transformers makes an empty one, to which every prompt is empty."""


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
