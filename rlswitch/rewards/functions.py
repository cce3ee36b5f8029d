"""The built-in reward functions: on the CPU, with TRL's signature.

    prompts        list of strings, or of lists of chat messages
    completions    list of strings, or of [{"role": "assistant", "content": text}]
    **columns      completion_ids (the sampled tokens), and each other column of the dataset

all of one length; the answer has it too. None means not applicable: left out of the weighted sum.
An exception in the place of a number means that this row has no reward, and why.
"""

from __future__ import annotations

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
"""For reading one completion and comparing it with the answer; then it has no reward."""


def completion_text(completion: Completion) -> str:
    """What the model wrote, of a text or of a chat completion."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def exact_match(
    prompts: Sequence[Any], completions: Sequence[Completion], answer: Sequence[Any], **columns: Any
) -> list[float | None]:
    """1 where the completion is the answer, up to white space around either; else 0."""
    return [
        None if right is None else float(completion_text(given).strip() == str(right).strip())
        for given, right in zip(completions, answer, strict=True)
    ]


def length(prompts: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """How many tokens were sampled: a price per token with a negative weight."""
    return [float(len(token_ids)) for token_ids in completion_ids]


def math(
    prompts: Sequence[Any], completions: Sequence[Completion], answer: Sequence[Any], **columns: Any
) -> list[float | TimeoutError | None]:
    """1 where the completion's last number or LaTeX expression equals the answer's; else 0.

    By math-verify: 1/2, 0.5 and \\boxed{\\frac{1}{2}} are equal, and what it cannot read or compare is
    wrong. None where it cannot read the answer itself.
    """
    return [_same(completion_text(given), right) for given, right in zip(completions, answer, strict=True)]


class Format:
    """1 where the pattern matches the whole completion, a dot matching line ends too; else 0."""

    def __init__(self, pattern: str):
        self._pattern = re.compile(pattern, re.DOTALL)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any
    ) -> list[float]:
        return [float(bool(self._pattern.fullmatch(completion_text(given)))) for given in completions]


class _Late(BaseException):
    """No Exception: math-verify and sympy swallow those and go on."""


def _same(given: str, right: Any) -> float | TimeoutError | None:
    from math_verify import parse, verify

    for module in ("math_verify.parser", "math_verify.grader"):  # each warns that its own alarm is off
        logging.getLogger(module).setLevel(logging.ERROR)
    try:
        with _alarm(MATH_SECONDS):
            gold = [] if right is None else parse(_delimited(str(right)), parsing_timeout=None)
            if not gold:
                return None
            return float(verify(gold, parse(given, parsing_timeout=None), timeout_seconds=None))
    except _Late:
        return TimeoutError(f"{MATH_SECONDS:g} s were not enough")


def _delimited(answer: str) -> str:
    """A bare formula gets delimiters: math-verify would take the first number in it for the answer."""
    answer = THOUSANDS.sub("", answer.strip())
    if DELIMITED.search(answer) or NUMBER.fullmatch(answer) or WORD.search(COMMAND.sub(" ", answer)):
        return answer
    return f"\\boxed{{{answer}}}" if FORMULA.search(answer) else answer


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raises _Late inside when it takes longer. For the main thread, which a worker calls functions in.

    math-verify's own time-out counts as a wrong answer, and cannot be told from one.
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
