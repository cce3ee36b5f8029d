"""The question a judge gets and how its reply is read: pure text, no model."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from string import Formatter
from typing import Any

from rlswitch.config.fields import did_you_mean
from rlswitch.text import prompt_text, shortened

OWN_BLANKS = ("prompt", "completion")

Messages = str | Sequence[Mapping[str, str]]


def fill_in(template: str, prompt: Messages, completion: str, columns: Mapping[str, Any]) -> str:
    """The template with its blanks filled in; braces inside the values are kept.

    Example: fill_in("{prompt}{completion}, not {answer}?", "1+1=", "3", {"answer": 2}) == "1+1=3, not 2?"
    """
    return template.format_map({**columns, "prompt": plain(prompt), "completion": completion})


def plain(messages: Messages) -> str:
    """A prompt as text: the message of a chat with only one, otherwise `role: content` lines."""
    if not isinstance(messages, str) and len(messages) == 1:
        return messages[0]["content"]
    return prompt_text(messages)


def blanks(template: str) -> list[str]:
    """The names in braces. Raises ValueError where braces hold anything else."""
    names = []
    for _, name, spec, conversion in Formatter().parse(template):
        if name is not None:
            if not name.isidentifier() or spec or conversion:
                raise ValueError("braces can hold a name only")
            names.append(name)
    return names


def read_score(reply: str, pattern: str, scale: float) -> float | None:
    """The last match of `pattern` as a number, divided by `scale`; None when there is none.

    Example: read_score("Good, but long: 7/10", r"(\\d+)/10", 10.0) == 0.7
    """
    found = re.findall(pattern, reply)
    try:
        score = float(found[-1]) / scale
    except (IndexError, ValueError):
        return None
    return score if math.isfinite(score) else None


def template_problems(template: str) -> Iterator[str]:
    """What is wrong with judge.prompt, whatever columns the dataset has."""
    blame = f"judge.prompt = {shortened(repr(template), 60)}"
    try:
        names = blanks(template)
    except ValueError as error:
        yield (
            f"{blame}: cannot be filled in ({error}); the judge could not be asked; write {{prompt}},"
            " {completion} or {a_column}, and {{ or }} for a brace itself"
        )
        return
    if "completion" not in names:
        yield (
            f"{blame}: has no {{completion}}, the judge would not see what it judges; put {{completion}}"
            " where the answer belongs"
        )


def blank_problems(template: str, columns: Sequence[str]) -> Iterator[str]:
    """A line for each blank that is neither prompt, completion nor a column of the dataset."""
    known = [*OWN_BLANKS, *columns]
    for name in dict.fromkeys(blanks(template)):
        if name not in known:
            yield (
                f"judge.prompt: {{{name}}} is no column of the dataset, so it could not be filled in; there"
                f" is {', '.join(known)}{did_you_mean(name, known)}"
            )


def pattern_problems(pattern: str) -> Iterator[str]:
    """What is wrong with judge.pattern."""
    blame = f"judge.pattern = {pattern}"
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        yield f"{blame}: is no regular expression ({error}), no score could be read; set one with one (group)"
        return
    if groups != 1:
        yield (
            f"{blame}: has {groups} groups, so which is the score could not be told; put the number in"
            " parentheses, and (?:...) around what is not the score"
        )
