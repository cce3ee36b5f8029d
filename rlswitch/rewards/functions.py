"""The built-in reward functions: pure, on the CPU, with TRL's signature.

    prompts        list of strings, or of lists of chat messages
    completions    list of strings, or of [{"role": "assistant", "content": text}]
    **columns      completion_ids (the sampled tokens), and each other column of the dataset

all of one length; the answer has it too. None means not applicable: left out of the weighted sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Completion = str | list[dict[str, str]]


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


BUILTIN: dict[str, Callable[..., Any]] = {"exact_match": exact_match, "length": length}
"""What reward.functions can name without a module or a file."""
