"""Text as a user reads it: cut to size, on one line, harmless on a terminal."""

import unicodedata
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; its type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def shortened(text: str, width: int) -> str:
    """At most `width` characters; a cut shows as three dots."""
    return text if len(text) <= width else text[: max(width - 3, 0)] + "..."


def fitted(facts: Sequence[str], width: int) -> str:
    """As many whole facts as fit on a line, so that no number is cut."""
    lines = accumulate(facts, "{}  {}".format)
    return max((line for line in lines if len(line) <= width), key=len, default="")


def printable(text: str, keep_newlines: bool = False) -> str:
    """Escapes control, format and unassigned characters: the result cannot move a cursor."""
    return "".join(
        char
        if unicodedata.category(char)[0] != "C" or (keep_newlines and char == "\n")
        else char.encode("unicode_escape").decode()
        for char in text
    )


def prompt_text(messages: str | Sequence[Mapping[str, str]]) -> str:
    """A prompt as one text; chat messages become `role: content` lines."""
    if isinstance(messages, str):
        return messages
    return "\n".join(f"{m.get('role', '')}: {m.get('content', '')}" for m in messages)


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as at most `width` block characters, each the mean of a run of values."""
    values = list(values)
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def duration(seconds: float) -> str:
    """`4.2 s`, `8m 26s`, `1h 02m`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"
