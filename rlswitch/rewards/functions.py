"""The built-in reward functions: on the CPU, with TRL's signature.

    prompts        list of strings, or of lists of chat messages
    completions    list of strings, or of [{"role": "assistant", "content": text}]
    **columns      completion_ids (the sampled tokens), and each other column of the dataset

all of one length, like the returned list. None means not applicable: left out of the weighted sum. An
exception in place of a number means that this row has no reward, and says why.
"""

import logging
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

DELIMITED = re.compile(r"\$|####|\\[(\[]|\\boxed")
THOUSANDS = re.compile(r"(?<=\d)(\\,|\{,\}|,\\!)(?=\d{3})")
_AMOUNT = r"[$\u20ac\u00a3\u00a5]?\s*[+-]?(\d{1,3}(,\d{3})+|\d+)?(\.\d+)?([eE][+-]?\d+)?"
_UNIT = r"\s*(\\?%|[\u20ac\u00a3\u00a5]|\u00b0\s*[CF]?)|\s[A-Za-z](\s*/\s*[A-Za-z])?(\^?[23\u00b2\u00b3])?"
NUMBER = re.compile(rf"{_AMOUNT}({_UNIT})?|[+-]?\d+\s*/\s*\d+")
COMMAND = re.compile(r"\\(?:begin|end)\{\w+\*?\}|\\[A-Za-z]+")
WORD = re.compile(r"[^\W\d_]{2,}")
FORMULA = re.compile(r"[^\w\s.]|\d\s*[A-Za-z]|[A-Za-z]\s*\d")

Completion = str | list[dict[str, str]]
MATH_SECONDS = 5.0
"""Time limit for reading one completion and comparing it with the answer; beyond it there is no reward."""


def last_message(messages: str | list[dict[str, str]]) -> str:
    """A prompt or completion that is a string, or the text of its last chat message."""
    return messages if isinstance(messages, str) else messages[-1]["content"]


def exact_match(
    prompts: Sequence[Any], completions: Sequence[Completion], answer: Sequence[Any], **columns: Any
) -> list[float | None]:
    """1 where the completion equals the answer, ignoring white space around either; else 0."""
    return [
        None if right is None else float(last_message(given).strip() == str(right).strip())
        for given, right in zip(completions, answer, strict=True)
    ]


def length(prompts: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """The number of sampled tokens: with a negative weight, a price per token."""
    return [float(len(token_ids)) for token_ids in completion_ids]


def math(
    prompts: Sequence[Any], completions: Sequence[Completion], answer: Sequence[Any], **columns: Any
) -> list[float | TimeoutError | None]:
    """1 where the completion's last number or LaTeX expression equals the answer's; else 0.

    By math-verify: 1/2, 0.5 and \\boxed{\\frac{1}{2}} are equal; a completion that it cannot read or compare
    is wrong. None where it cannot read the answer itself.
    """
    return [_same(last_message(given), right) for given, right in zip(completions, answer, strict=True)]


class Format:
    """1 where the pattern matches the whole completion (dots match line ends); else 0."""

    def __init__(self, pattern: str):
        self._pattern = re.compile(pattern, re.DOTALL)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any
    ) -> list[float]:
        return [float(bool(self._pattern.fullmatch(last_message(given)))) for given in completions]


class _Late(BaseException):
    """Not an Exception: math-verify and sympy swallow those and continue."""


def _same(given: str, right: Any) -> float | TimeoutError | None:
    from math_verify import parse, verify

    for module in ("math_verify.parser", "math_verify.grader"):  # each warns that its own time limit is off
        logging.getLogger(module).setLevel(logging.ERROR)
    try:
        with _alarm(MATH_SECONDS):
            gold = [] if right is None else parse(_delimited(str(right)), parsing_timeout=None)
            if not gold:
                return None
            return float(verify(gold, parse(given, parsing_timeout=None), timeout_seconds=None))
    except _Late:
        return TimeoutError(f"took longer than {MATH_SECONDS:g} s")


def _delimited(answer: str) -> str:
    """Delimits a bare formula: math-verify would take its first number for the answer."""
    answer = THOUSANDS.sub("", answer.strip())
    if DELIMITED.search(answer) or NUMBER.fullmatch(answer) or WORD.search(COMMAND.sub(" ", answer)):
        return answer
    return f"\\boxed{{{answer}}}" if FORMULA.search(answer) else answer


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raises _Late in the body after `seconds`. Main thread only, where a worker calls its functions.

    math-verify's own time limit would make a slow comparison look like a wrong answer.
    """

    def ring(*_: object) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
