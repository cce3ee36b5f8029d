"""The rows of a file, a directory, a dataset of the hub, or a built-in task.

`builtin:NAME` is made on the spot, so that the whole loop runs without a download. To add a task, write a
module with `load_datasets` and `build_tokenizer` (neither may import torch) and add it to TASKS; add its
models in hub.py.

JSON and CSV files are read here and not by `datasets`, which guesses types from strings: the answer "007"
would reach the reward functions as 7, "NA" as nothing and "2020-01-01 00:00:00" as a date.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from rlswitch.config.fields import did_you_mean
from rlswitch.errors import ConfigError

TASKS = {"addition": "rlswitch.recipes.addition.task"}
BUILTIN = "builtin:"

HUB_ID = re.compile(r"(?=.{1,96}$)\w[\w.-]*(/\w[\w.-]*)?")
"""Of a model or a dataset: name or owner/name."""

_TEXT = (".jsonl", ".json", ".csv")
_SUFFIXES = (*_TEXT, ".parquet")
_MAX_LINES = 5  # for one kind of mistake in one source

T = TypeVar("T")


@dataclass(slots=True)
class Source:
    """Where rows come from, and the settings that say so."""

    key: str
    path: str
    split_key: str
    split: str | None
    """None: the only split."""
    name: str | None

    @property
    def file(self) -> Path:
        return Path(os.path.expanduser(self.path))  # not Path.expanduser: that raises for an unknown user

    @property
    def is_text(self) -> bool:
        """Whether its rows are read here and not by `datasets`."""
        return self.file.suffix in _TEXT and os.path.isfile(self.file)

    def error(self, problem: str) -> ConfigError:
        return ConfigError(f"{self.key} = {self.path}: {problem}")

    def split_error(self, problem: str) -> ConfigError:
        return ConfigError(f"{self.split_key} = {self.split or 'null'}: {self.path} {problem}")


@dataclass(slots=True)
class Table:
    """The rows of a source, all with the same columns."""

    source: Source
    rows: list[dict[str, Any]]
    lines: list[int] = field(default_factory=list)
    """Line number of each row, for a source that has lines."""

    def where(self, row: int) -> str:
        """The file and line of a row, or its number."""
        if self.lines:
            return f"{Path(self.source.path).name}:{self.lines[row]}"
        return f"row {row} of {self.source.path}"


def gather(calls: Iterable[Callable[[], T]]) -> list[T]:
    """What each call returns. Raises one ConfigError with the problems of all of them."""
    results, problems = [], []
    for call in calls:
        try:
            results.append(call())
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*dict.fromkeys(problems))  # two splits of one source can have the same problem
    return results


def read(source: Source) -> Table:
    """The rows of `source`, at least one. Raises ConfigError if it cannot be read."""
    check_source(source)
    try:
        if source.is_text:
            table = (_read_csv if source.file.suffix == ".csv" else _read_json)(source, source.file)
        else:
            task = task_of(source.path)
            table = Table(source, _rows(task.load_datasets() if task else _load(source), source))
    except OSError as error:
        raise source.error(f"cannot be read ({error.strerror or error})") from error
    if not table.rows:
        raise source.error("has no rows; give at least one")
    return table


def check_source(source: Source) -> None:
    """Raises ConfigError for a source that cannot exist. Fast: reads nothing, imports nothing."""
    file, is_file = source.file, os.path.isfile(source.file)
    check_builtin(source.key, source.path, "task", TASKS)
    if is_file and file.suffix not in _SUFFIXES:
        raise source.error(f"not a {' '.join(_SUFFIXES)} file, a directory or a hub id")
    is_hub_id = file.suffix not in _SUFFIXES and HUB_ID.fullmatch(source.path)
    if not (os.path.exists(file) or is_hub_id or source.path.startswith(BUILTIN)):
        raise source.error(f"no such file{nearest_file(file)}")
    if (is_file or os.path.exists(file / "state.json")) and source.split not in (None, "train"):
        raise source.split_error("has no splits; leave it out, or name another file with data.eval_path")


def task_of(path: str) -> ModuleType | None:
    """The task that `builtin:NAME` belongs to, as data or as a model; None for any other path."""
    if not path.startswith(BUILTIN):
        return None
    return import_module(TASKS[path.removeprefix(BUILTIN).partition("-")[0]])


def check_builtin(key: str, path: str, kind: str, known: Collection[str]) -> None:
    """Raises ConfigError if `path`, the value of the setting `key`, is a built-in that is not `known`."""
    name = path.removeprefix(BUILTIN)
    if path.startswith(BUILTIN) and name not in known:
        available = f"(available: {', '.join(known)}){did_you_mean(name, known)}"
        raise ConfigError(f"{key} = {path}: no such built-in {kind} {available}")


def nearest_file(missing: Path) -> str:
    """`; did you mean 'x'?` for a file beside the missing one with a similar name."""
    with suppress(OSError, ValueError):
        return did_you_mean(missing.name, os.listdir(missing.parent))
    return ""


def _rows(loaded: Any, source: Source) -> list[dict[str, Any]]:
    """The rows of a Dataset, or of the split that `source` asks for."""
    if not isinstance(loaded, dict):
        return list(loaded)
    split = next(iter(loaded)) if len(loaded) == 1 and not source.split else source.split
    if split not in loaded:
        near = did_you_mean(str(split), loaded)
        raise source.split_error(f"has the splits {', '.join(loaded)}{near}; set one of them")
    return list(loaded[split])


def _load(source: Source) -> Any:
    """A parquet file, a directory or a hub id, read by `datasets`."""
    import datasets

    file = source.file
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # its exceptions say it all
    if os.path.exists(file):
        datasets.disable_progress_bars()  # they are useful for a download only
    try:
        if file.is_file():
            return datasets.load_dataset("parquet", data_files=str(file), split="train")
        if (file / "dataset_dict.json").exists() or (file / "state.json").exists():
            return datasets.load_from_disk(str(file))
        path = str(file) if file.is_dir() else source.path
        return datasets.load_dataset(path, source.name, split=source.split)
    except Exception as error:  # datasets raises nearly every type
        for part in sorted(file.rglob("*.jsonl")) if file.is_dir() else []:
            _read_json(source, part)  # names the bad line, which datasets does not
        if isinstance(error, ConnectionError) and datasets.config.HF_HUB_OFFLINE:
            problem = "no such file, and not in the hub's local cache; HF_HUB_OFFLINE=1: unset it"
            raise source.error(problem) from error
        if isinstance(error, ValueError) and "unknown split" in str(error).lower():
            raise source.split_error(f"cannot be loaded ({reason(error)})") from error
        raise source.error(f"cannot be loaded ({reason(error)})") from error


def reason(error: BaseException) -> str:
    """The innermost cause in one line: libraries wrap it in sentences that say nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _read_json(source: Source, file: Path) -> Table:
    """One object per line, or one list of objects."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise source.error(f"{file.name}:{line} is not UTF-8 ({error.reason})") from error
    table, problems = Table(source, []), []
    is_list = text.lstrip().startswith("[")
    for line, part in enumerate([text] if is_list else text.split("\n"), 1):
        if not part.strip():
            continue
        try:
            value = json.loads(part)
        except json.JSONDecodeError as error:
            at = f"{file.name}:{line + error.lineno - 1}"
            problems.append(f"{at} is not valid JSON ({error.msg}, column {error.colno})")
            continue
        except (ValueError, RecursionError) as error:  # a number of 5000 digits, a list 100,000 deep
            problems.append(f"{file.name}:{line} cannot be read ({reason(error)})")
            continue
        table.rows += value if is_list else [value]
        table.lines += [] if is_list else [line]
    for row, value in enumerate(table.rows):
        if not isinstance(value, dict):
            problems.append(f"{table.where(row)} is not an object but {shown(value)}")
    if problems:
        raise ConfigError(*few(f"{source.key} = {source.path}", problems))
    columns = dict.fromkeys(key for row in table.rows for key in row)
    table.rows = [{key: row.get(key) for key in columns} for row in table.rows]
    return table


def _read_csv(source: Source, file: Path) -> Table:
    """Values stay strings; a short row ends in nulls."""
    table = Table(source, [])
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            header = reader.fieldnames or []
            if twice := [name for name in header if header.count(name) > 1]:
                raise csv.Error(f"two columns are called '{twice[0]}', one would hide the other")
            for row in reader:
                if None in row:
                    raise csv.Error("more values than the header has columns")
                table.rows.append(row)
                table.lines.append(reader.line_num)
        except (csv.Error, UnicodeDecodeError) as error:
            at = f"{file.name}:{reader.line_num}"
            raise source.error(f"{at} is not valid UTF-8 CSV ({error})") from error
    return table


def shown(value: Any) -> str:
    """The start of a wrong value, as JSON, for a message."""
    return json.dumps(value, default=repr)[:40]


def few(blame: str, problems: list[str]) -> list[str]:
    """The first problems, each after `blame`, and how many more there are."""
    more = len(problems) - _MAX_LINES
    lines = [*problems[:_MAX_LINES], *([f"{more} more rows are wrong too"] if more > 0 else [])]
    return [f"{blame}: {line}" for line in lines]
