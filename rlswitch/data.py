"""Prompts: where they come from, what is wrong with them, and in which order they are trained on.

JSON and CSV files are read here, not by `datasets`: it guesses types from strings, and the answer
"007" would reach the reward functions as 7, "NA" as nothing and "2020-01-01 00:00:00" as a date.
"""

from __future__ import annotations

import csv
import importlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlswitch.options import did_you_mean
from rlswitch.types import ConfigError, Prompt

if TYPE_CHECKING:  # datasets and transformers take seconds to import
    from transformers import PreTrainedTokenizerBase

    from rlswitch.config import ModelConfig, Run

TASKS = {"addition": "rlswitch.tasks.addition"}
"""Built-in tasks: `data.path = builtin:NAME` is load_datasets() of the module."""

_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_PROMPT_COLUMNS = ("prompt", "question", "problem", "messages", "instruction", "query", "input")
_HELD_OUT_SEED = 0  # not run.seed: every seed of a sweep is to be evaluated on the same prompts
_MAX_LINES = 5  # of one kind of mistake in one source

Say = Callable[[str], None]


class Prompts:
    """An endless stream of prompts: one permutation per epoch, a pure function of (seed, epoch).

    `cursor` is its whole state: a stream of the same prompts and seed goes on exactly where another
    stopped after `seek(cursor)`.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int):
        assert prompts, "a stream needs at least one prompt"
        self.cursor = 0
        """How many prompts were handed out."""
        self._prompts = prompts
        self._seed = seed
        self._order = (-1, np.empty(0, dtype=np.int64))  # (epoch, its permutation)

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def epoch(self) -> float:
        """Passes over the prompts so far, with the fraction of the current one."""
        return self.cursor / len(self)

    def seek(self, cursor: int) -> None:
        """Go on as if `cursor` prompts had been handed out."""
        assert cursor >= 0, cursor
        self.cursor = cursor

    def take(self, n: int) -> list[Prompt]:
        """The next `n` prompts, across the border of an epoch if need be."""
        places = range(self.cursor, self.cursor + n)
        taken = [self._prompts[self._index(*divmod(place, len(self)))] for place in places]
        self.cursor += n
        return taken

    def _index(self, epoch: int, place: int) -> int:
        if self._order[0] != epoch:
            # RandomState, not default_rng: numpy promises that its stream never changes
            random = np.random.RandomState([self._seed, epoch])
            self._order = (epoch, random.permutation(len(self)))
        return int(self._order[1][place])


def load_tokenizer(model: ModelConfig, path: str) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`, where model.path leads to; a missing pad token becomes eos."""
    from transformers import AutoTokenizer

    blame = f"model.path = {model.path}"
    if not Path(path).exists() and not _HUB_ID.fullmatch(path):
        raise ConfigError(f"{blame}: no such directory, and not a hub id (name or owner/name)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # transformers raises nearly every type: all mean the same to a user
        what = f"cannot load its tokenizer ({_reason(error)})"
        if "trust_remote_code" in str(error):
            what = "its tokenizer is custom code; set model.trust_remote_code=true to run it"
        raise ConfigError(f"{blame}: {what}") from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{blame}: its tokenizer has no end-of-sequence token, so no completion would ever end;"
            " set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_prompts(
    run: Run, tokenizer: PreTrainedTokenizerBase, say: Say = print
) -> tuple[Prompts, list[Prompt]]:
    """The stream of training prompts, and the held-out ones in the order of their rows.

    With evaluation.every = 0 no rows are cut off the training split; rows named as held out stay
    so. `say` gets a line for every set of rows left out. Raises ConfigError with everything that is
    wrong with all the sources.
    """
    parts, problems = [], []
    for source in _sources(run):
        try:
            parts.append(_tokenize(_read(source), run, tokenizer, say))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*dict.fromkeys(problems))  # two splits of one source can say the same
    training, *others = parts
    found, held_out = len(training), []
    if others:
        held_out = _choose(others[0], run.data.eval_rows)
    elif run.evaluation.every:
        held_out = _cut(training, run, say)
    training = _without(training, held_out, say)
    if len(training) < run.rollout.num_prompts:
        raise ConfigError(
            f"rollout.num_prompts = {run.rollout.num_prompts}: {run.data.path} leaves only"
            f" {len(training)} of {found} prompts to train on, the others being held out;"
            " set fewer, or give more rows"
        )
    return Prompts(training, run.seed), held_out


# ---- which rows


@dataclass(slots=True)
class _Source:
    """A place that a setting names."""

    key: str
    path: str
    split_key: str
    split: str | None  # None: the only one there is
    name: str | None

    def problem(self, what: str) -> ConfigError:
        return ConfigError(f"{self.key} = {self.path}: {what}")


@dataclass(slots=True)
class _Table:
    """The rows of a source, all with the same columns."""

    source: _Source
    rows: list[dict[str, Any]]
    lines: list[int] = field(default_factory=list)  # of each row, where the source has lines

    def where(self, row: int) -> str:
        if self.lines:
            return f"{Path(self.source.path).name}:{self.lines[row]}"
        return f"row {row} of {self.source.path}"


def _sources(run: Run) -> Iterator[_Source]:
    data = run.data
    yield _Source("data.path", data.path, "data.split", data.split, data.name)
    key = "data.eval_path" if data.eval_path else "data.path"
    path = data.eval_path or data.path
    split = data.eval_split or ("test" if path.startswith("builtin:") else None)
    if data.eval_path or split:
        name = data.name if path == data.path else None
        yield _Source(key, path, "data.eval_split", split, name)


def _choose(prompts: list[Prompt], n: int) -> list[Prompt]:
    order = np.random.RandomState(_HELD_OUT_SEED).permutation(len(prompts))
    return [prompts[i] for i in sorted(order[:n])]


def _cut(training: list[Prompt], run: Run, say: Say) -> list[Prompt]:
    n = run.data.eval_rows
    if n >= len(training):
        raise ConfigError(
            f"data.eval_rows = {n}: {run.data.path} has {len(training)} prompts, so none would be"
            f" left to train on; set data.eval_rows={max(len(training) // 10, 1)}, or name held-out"
            " rows with data.eval_path or data.eval_split"
        )
    say(f"data: held out {n} of the {len(training)} prompts of {run.data.path}")
    return _choose(training, n)


def _without(training: list[Prompt], held_out: list[Prompt], say: Say) -> list[Prompt]:
    """`training` without any prompt that is also held out."""
    cut = {id(prompt) for prompt in held_out}  # the very rows that _cut took: said already
    training = [prompt for prompt in training if id(prompt) not in cut]
    hidden = {tuple(prompt.token_ids) for prompt in held_out}
    kept = [prompt for prompt in training if tuple(prompt.token_ids) not in hidden]
    if removed := len(training) - len(kept):
        say(f"data: removed {removed} of {len(training)} training rows: their prompt is held out")
    return kept


# ---- reading


def _read(source: _Source) -> _Table:
    file = Path(source.path).expanduser()
    if (file.is_file() or (file / "state.json").exists()) and source.split not in (None, "train"):
        raise ConfigError(
            f"{source.split_key} = {source.split}: {source.path} has no splits; leave"
            f" {source.split_key} out, or name another file with data.eval_path"
        )
    if file.is_file() and file.suffix in (".jsonl", ".json"):
        table = _read_json(source, file)
    elif file.is_file() and file.suffix == ".csv":
        table = _read_csv(source, file)
    else:
        builtin = source.path.startswith("builtin:")
        loaded = _builtin(source) if builtin else _load(source, file)
        table = _Table(source, _rows(loaded, source))
    if not table.rows:
        raise source.problem("has 0 rows; give at least one")
    return table


def _builtin(source: _Source) -> Any:
    name = source.path.removeprefix("builtin:")
    if name not in TASKS:
        hint = did_you_mean(name, TASKS)
        raise source.problem(f"no such built-in task (there is {', '.join(TASKS)}){hint}")
    return importlib.import_module(TASKS[name]).load_datasets()


def _rows(loaded: Any, source: _Source) -> list[dict[str, Any]]:
    """The rows of a Dataset, or of the split that `source` asks for."""
    if not isinstance(loaded, dict):
        return list(loaded)
    split = next(iter(loaded)) if len(loaded) == 1 and not source.split else source.split
    if split not in loaded:
        raise ConfigError(
            f"{source.split_key} = {split or 'null'}: {source.path} has the splits"
            f" {', '.join(loaded)}{did_you_mean(str(split), loaded)}; set one of them"
        )
    return list(loaded[split])


def _load(source: _Source, file: Path) -> Any:
    """What `datasets` makes of a parquet file, a directory or a hub id."""
    import datasets

    if not file.exists() and (file.suffix in _SUFFIXES or not _HUB_ID.fullmatch(source.path)):
        near = [item.name for item in file.parent.iterdir()] if file.parent.is_dir() else []
        raise source.problem(f"no such file{did_you_mean(file.name, near)}")
    if file.is_file() and file.suffix != ".parquet":
        raise source.problem(f"not a {' '.join(_SUFFIXES)} file, a directory or a hub id")
    try:
        if file.is_file():
            return datasets.load_dataset("parquet", data_files=str(file), split="train")
        if (file / "dataset_dict.json").exists() or (file / "state.json").exists():
            return datasets.load_from_disk(str(file))
        path = str(file) if file.is_dir() else source.path
        return datasets.load_dataset(path, source.name, split=source.split)
    except Exception as error:  # datasets raises nearly every type: all mean the same to a user
        for part in sorted(file.rglob("*.jsonl")) if file.is_dir() else []:
            _read_json(source, part)  # names the bad line, which datasets does not
        if isinstance(error, ConnectionError) and datasets.config.HF_HUB_OFFLINE:
            what = "no such file, and not in the hub's local cache; HF_HUB_OFFLINE=1: unset it"
            raise source.problem(what) from error
        if isinstance(error, ValueError) and "unknown split" in str(error).lower():
            what = f"{source.split_key} = {source.split}: {source.path}: {_reason(error)}"
            raise ConfigError(what) from error
        raise source.problem(f"cannot load it ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    """One line from the innermost cause: `datasets` wraps it in a sentence that says nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _read_json(source: _Source, file: Path) -> _Table:
    """One object per line, or one list of objects."""
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise source.problem(f"{file.name}:{line} is not UTF-8 ({error.reason})") from error
    table, problems = _Table(source, []), []
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
        table.rows += value if is_list else [value]
        table.lines += [] if is_list else [line]
    for row, value in enumerate(table.rows):
        if not isinstance(value, dict):
            problems.append(f"{table.where(row)} is not an object but {_shown(value)}")
    if problems:
        raise ConfigError(*_few(f"{source.key} = {source.path}", problems))
    columns = dict.fromkeys(key for row in table.rows for key in row)
    table.rows = [{key: row.get(key) for key in columns} for row in table.rows]
    return table


def _read_csv(source: _Source, file: Path) -> _Table:
    """Every value stays a string; a short row ends in nulls."""
    table = _Table(source, [])
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            for row in reader:
                if None in row:
                    raise csv.Error("more values than the header has columns")
                table.rows.append(row)
                table.lines.append(reader.line_num)
        except (csv.Error, UnicodeDecodeError) as error:
            at = f"{file.name}:{reader.line_num}"
            raise source.problem(f"{at} is not valid UTF-8 CSV ({error})") from error
    return table


# ---- rows to prompts


def _tokenize(table: _Table, run: Run, tokenizer: PreTrainedTokenizerBase, say: Say) -> list[Prompt]:
    """The rows as prompts, without those that data.overlong drops."""
    key = run.data.prompt_key
    blame = f"data.prompt_key = {key}"
    if key not in (columns := table.rows[0]):
        guess = next((name for name in _PROMPT_COLUMNS if name in columns), "...")
        hint = did_you_mean(key, columns) or f"; set data.prompt_key={guess}"
        raise ConfigError(f"{blame}: {table.source.path} has only {', '.join(columns)}{hint}")
    if isinstance(table.rows[0][key], list) and not tokenizer.chat_template:
        raise ConfigError(
            f"{blame}: holds chat messages, but the tokenizer of {run.model.path} has no chat"
            " template; set model.path to an instruct model, or give a column of strings"
        )
    prompts, problems = [], []
    for index, row in enumerate(table.rows):
        columns = dict(row)
        messages, token_ids = _without_nulls(columns.pop(key)), []
        if not (fault := _fault(messages)):
            try:
                token_ids = _encode(messages, tokenizer)
                fault = "" if token_ids else "is empty: it has no tokens"
            except Exception as error:  # a chat template raises whatever it likes
                what = "tokenizer" if isinstance(messages, str) else "chat template"
                fault = f"makes the {what} fail ({_reason(error)})"
        if fault:
            problems.append(f"{table.where(index)} {fault}")
        prompts.append(Prompt(index=index, messages=messages, token_ids=token_ids, columns=columns))
    if problems:
        raise ConfigError(*_few(blame, problems))
    return _within_limit(prompts, table, run, say)


def _without_nulls(messages: Any) -> Any:
    """Chat messages without the null fields that Arrow adds: templates take them for given ones."""
    if not isinstance(messages, list) or not all(isinstance(item, dict) for item in messages):
        return messages
    return [{k: v for k, v in item.items() if v is not None} for item in messages]


def _fault(messages: Any) -> str:
    """What is wrong with a prompt, or nothing."""
    if isinstance(messages, str):
        texts: list[Any] = [messages]
    elif not isinstance(messages, list):
        return f"is {_shown(messages)}; it must be a string or a list of chat messages"
    else:
        chat = [item if isinstance(item, dict) else {} for item in messages]
        texts = [item.get(name) for item in chat for name in ("role", "content")]
        if not texts or not all(isinstance(text, str) for text in texts):
            return "is not a list of chat messages, {role: string, content: string} each"
    if any("\ud800" <= char <= "\udfff" for text in texts if not text.isascii() for char in text):
        return "is not valid Unicode: it has half of a surrogate pair"
    return ""


def _encode(messages: str | list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if isinstance(messages, str):
        token_ids = list(tokenizer(messages)["input_ids"])
        if token_ids and token_ids[-1] == tokenizer.eos_token_id:
            token_ids.pop()  # some tokenizers end every text: nothing could follow
        return token_ids
    goes_on = messages[-1]["role"] == "assistant"  # as in TRL: the completion goes on with it
    token_ids = tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=not goes_on,
        continue_final_message=goes_on,
        tokenize=True,
        return_dict=False,
    )
    return list(token_ids)


def _within_limit(prompts: list[Prompt], table: _Table, run: Run, say: Say) -> list[Prompt]:
    limit, lengths = run.data.max_prompt_tokens, [len(prompt.token_ids) for prompt in prompts]
    num_long, longest = sum(length > limit for length in lengths), max(lengths)
    if not num_long:
        return prompts
    many = (
        f"{num_long} of {len(prompts)} prompts of {table.source.path} are longer (the longest has"
        f" {longest} tokens: {table.where(lengths.index(longest))})"
    )
    if num_long == len(prompts) or run.data.overlong == "error":
        drop = " or data.overlong=drop" if num_long < len(prompts) else ""
        set_it = f"set data.max_prompt_tokens={longest}{drop}"
        raise ConfigError(f"data.max_prompt_tokens = {limit}: {many}; {set_it}")
    say(f"data: dropped, by data.max_prompt_tokens = {limit}: {many}")
    return [prompt for prompt in prompts if len(prompt.token_ids) <= limit]


def _shown(value: Any) -> str:
    return json.dumps(value, default=repr)[:40]


def _few(blame: str, problems: list[str]) -> list[str]:
    """The first problems, each with what is to blame, and how many more there are."""
    more = len(problems) - _MAX_LINES
    lines = [*problems[:_MAX_LINES], *([f"{more} more rows are wrong too"] if more > 0 else [])]
    return [f"{blame}: {line}" for line in lines]
