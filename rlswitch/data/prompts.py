"""Prompts: which rows they come from, their tokens, and the order in which they are trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from rlswitch.config.fields import did_you_mean
from rlswitch.data.rows import Source, Table, few, gather, read, reason, shown
from rlswitch.errors import ConfigError
from rlswitch.types import Prompt

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerBase

    from rlswitch.run import Run

_PROMPT_COLUMNS = ("prompt", "question", "problem", "messages", "instruction", "query", "input")
_HELD_OUT_SEED = 0  # not run.seed: every seed of a sweep is evaluated on the same prompts

Log = Callable[[str], None]


class Prompts:
    """An endless stream of prompts: one permutation per epoch, a pure function of (seed, epoch).

    `cursor` is its whole state: after `seek(cursor)` a stream of the same prompts and seed continues exactly
    where another one stopped.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int):
        assert prompts, "a stream needs at least one prompt"
        self.cursor = 0
        """How many prompts were taken."""
        self._prompts = prompts
        self._seed = seed

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def epoch(self) -> float:
        """Passes over the prompts so far, with the fraction of the current one."""
        return self.cursor / len(self)

    def seek(self, cursor: int) -> None:
        """Continues as if `cursor` prompts had been taken."""
        assert cursor >= 0, cursor
        self.cursor = cursor

    def take(self, n: int) -> list[Prompt]:
        """The next `n` prompts, into the next epoch if need be."""
        places = [divmod(place, len(self)) for place in range(self.cursor, self.cursor + n)]
        self.cursor += n
        orders = {epoch: self._order(epoch) for epoch in {epoch for epoch, _ in places}}
        return [replace(self._prompts[orders[epoch][place]], epoch=epoch) for epoch, place in places]

    def _order(self, epoch: int) -> list[int]:
        # RandomState, not default_rng: numpy promises that its stream never changes
        return np.random.RandomState([self._seed, epoch]).permutation(len(self)).tolist()


def sources_of(run: Run) -> Iterator[Source]:
    """Where the training rows come from, and the held-out rows if they have a source of their own."""
    data = run.data
    yield Source("data.path", data.path, "data.split", data.split, data.name)
    if not data.cuts_held_out_rows:
        key = "data.eval_path" if data.eval_path else "data.path"
        path = data.eval_path or data.path
        split = data.eval_split or ("test" if path.startswith("builtin:") else None)
        yield Source(key, path, "data.eval_split", split, data.name if path == data.path else None)


def read_tables(run: Run) -> list[Table]:
    """The rows of every source. Raises ConfigError with everything that is wrong with them."""
    return gather(partial(read_table, source, run.data.prompt_key) for source in sources_of(run))


def read_table(source: Source, prompt_key: str) -> Table:
    """The rows of `source`. Raises ConfigError if the column `prompt_key` is missing or not all prompts."""
    table = read(source)
    blame, columns = f"data.prompt_key = {prompt_key}", table.rows[0]
    if prompt_key not in columns:
        guess = next((name for name in _PROMPT_COLUMNS if name in columns), "...")
        hint = did_you_mean(prompt_key, columns) or f"; set data.prompt_key={guess}"
        raise ConfigError(f"{blame}: {source.path} has only {', '.join(columns)}{hint}")
    found = ((index, _prompt_problem(row[prompt_key])) for index, row in enumerate(table.rows))
    if problems := [f"{table.where(index)} {problem}" for index, problem in found if problem]:
        raise ConfigError(*few(blame, problems))
    return table


def _prompt_problem(messages: Any) -> str:
    if isinstance(messages, str):
        texts: list[Any] = [messages]
    elif not isinstance(messages, list):
        return f"is {shown(messages)}; it must be a string or a list of chat messages"
    else:
        chat = [item if isinstance(item, dict) else {} for item in messages]
        texts = [item.get(name) for item in chat for name in ("role", "content")]
        if not texts or not all(isinstance(text, str) for text in texts):
            return "is not a list of chat messages, {role: string, content: string} each"
    if any("\ud800" <= char <= "\udfff" for text in texts if not text.isascii() for char in text):
        return "is not valid Unicode: it has half of a surrogate pair"
    return ""


def load_prompts(
    run: Run, tables: Sequence[Table], tokenizer: PreTrainedTokenizerBase, log: Log = print
) -> tuple[Prompts, list[Prompt]]:
    """The stream of training prompts, and the held-out prompts in the order of their rows.

    With evaluation.every = 0 no rows are cut off the training split, but rows that a setting names as held
    out stay so. Logs every set of rows that is left out. Raises ConfigError with all problems of all tables.
    """
    training, *others = gather(partial(_tokenize, table, run, tokenizer, log) for table in tables)
    found, path, held_out = len(training), run.data.path, list[Prompt]()
    if others:
        held_out, _ = _choose(others[0], run.data.eval_rows)
    elif run.evaluation.every:
        if (n := run.data.eval_rows) >= found:
            raise ConfigError(
                f"data.eval_rows = {n}: {path} has {found} prompts, so none would be left to train on; set"
                f" data.eval_rows={max(found // 10, 1)}, or set data.eval_path or data.eval_split"
            )
        log(f"data: held out {n} of the {found} prompts of {path}")
        held_out, training = _choose(training, n)
    hidden = {tuple(prompt.token_ids) for prompt in held_out}
    kept = [prompt for prompt in training if tuple(prompt.token_ids) not in hidden]
    if removed := len(training) - len(kept):
        log(f"data: removed {removed} of {len(training)} training rows: their prompt is held out")
    if len(kept) < run.rollout.num_prompts:
        raise ConfigError(
            f"rollout.num_prompts = {run.rollout.num_prompts}: {path} has only {len(kept)} of {found} prompts"
            " left to train on, the others are held out; set fewer, or give more rows"
        )
    return Prompts(kept, run.seed), held_out


def _choose(prompts: list[Prompt], n: int) -> tuple[list[Prompt], list[Prompt]]:
    """`n` prompts, always the same ones, and the others; both in their order."""
    chosen = {*np.random.RandomState(_HELD_OUT_SEED).permutation(len(prompts))[:n].tolist()}
    parts: tuple[list[Prompt], list[Prompt]] = ([], [])
    for i, prompt in enumerate(prompts):
        parts[i not in chosen].append(prompt)
    return parts


def _tokenize(table: Table, run: Run, tokenizer: PreTrainedTokenizerBase, log: Log) -> list[Prompt]:
    """The rows as prompts, without those that data.overlong drops."""
    blame = f"data.prompt_key = {(key := run.data.prompt_key)}"
    if not tokenizer.chat_template and any(isinstance(row[key], list) for row in table.rows):
        raise ConfigError(
            f"{blame}: holds chat messages, but the tokenizer of {run.model.path} has no chat"
            " template; set model.path to an instruct model, or give a column of strings"
        )
    prompts, problems = [], []
    for index, row in enumerate(table.rows):
        columns = dict(row)
        messages = columns.pop(key)
        if isinstance(messages, list):  # a template would treat the null fields that Arrow adds as given
            messages = [{k: v for k, v in item.items() if v is not None} for item in messages]
        try:
            token_ids = encode(messages, tokenizer)
        except Exception as error:  # a chat template can raise anything
            what = "tokenizer" if isinstance(messages, str) else "chat template"
            problems.append(f"{table.where(index)} makes the {what} fail ({reason(error)})")
            continue
        if not token_ids:
            problems.append(f"{table.where(index)} is empty: it has no tokens")
        prompts.append(Prompt(index=index, messages=messages, token_ids=token_ids, columns=columns))
    if problems:
        raise ConfigError(*few(blame, problems))
    return _within_limit(prompts, table, run, log)


def encode(messages: str | list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text, or of chat messages through the chat template."""
    if isinstance(messages, str):
        token_ids = list(tokenizer(messages)["input_ids"])
        if token_ids and token_ids[-1] == tokenizer.eos_token_id:
            token_ids.pop()  # some tokenizers append it to every text: nothing could follow
        return token_ids
    continues = messages[-1]["role"] == "assistant"  # as in TRL: the completion continues that message
    token_ids = tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=not continues,
        continue_final_message=continues,
        tokenize=True,
        return_dict=False,
    )
    return list(token_ids)


def _within_limit(prompts: list[Prompt], table: Table, run: Run, log: Log) -> list[Prompt]:
    limit, lengths = run.data.max_prompt_tokens, [len(prompt.token_ids) for prompt in prompts]
    kept = [prompt for prompt in prompts if len(prompt.token_ids) <= limit]
    if len(kept) == len(prompts):
        return prompts
    longest = max(lengths)
    many = (
        f"{len(prompts) - len(kept)} of {len(prompts)} prompts of {table.source.path} are longer (the longest"
        f" has {longest} tokens: {table.where(lengths.index(longest))})"
    )
    if not kept or run.data.overlong == "error":
        drop = " or data.overlong=drop" if kept else ""
        raise ConfigError(
            f"data.max_prompt_tokens = {limit}: {many}; set data.max_prompt_tokens={longest}{drop}"
        )
    log(f"data: dropped, by data.max_prompt_tokens = {limit}: {many}")
    return kept
