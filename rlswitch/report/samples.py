"""The completions of a run as a table that fits on a page."""

from collections.abc import Mapping
from typing import Any
from zlib import crc32

from rlswitch.records.jsonl import finite
from rlswitch.text import prompt_text

MAX_CHARS = 12_000_000
"""Of all texts together, before compression."""
MAX_TEXT = 4000
FEW_PROMPTS = 8
COLUMNS = ("step", "prompt", "completion", "reward", "advantage", "end", "note")


class Samples:
    """All rollouts; if too many, those of every n-th prompt; of few prompts every n-th rollout."""

    def __init__(self, max_chars: int = MAX_CHARS):
        self.rows: list[dict[str, Any]] = []
        self.total = 0
        self._max_chars, self._chars = max_chars, 0
        self._nth_prompt = self._nth_row = 1

    def add(self, rollout: Mapping[str, Any]) -> None:
        """Takes a record of rollouts.jsonl."""
        prompt = prompt_text(rollout.get("prompt", ""))
        notes = (f"{name}: {text}" for key in ("errors", "extra") for name, text in _items(rollout, key))
        row = {
            "number": self.total,
            "hash": crc32(prompt.encode(errors="replace")),
            "step": rollout["step"],
            "prompt": _shortened(prompt),
            "completion": _shortened(str(rollout.get("completion", ""))),
            "reward": finite(rollout.get("reward")),
            "advantage": finite(rollout.get("advantage")),
            "end": str(rollout.get("finish_reason", "")),
            "note": _shortened("\n".join(notes)),
            "rewards": {name: finite(value) for name, value in _items(rollout, "rewards")},
        }
        self.total += 1
        if row["hash"] % self._nth_prompt == 0 == row["number"] % self._nth_row:
            self.rows.append(row)
            self._chars += _chars(row)
        while self._chars > self._max_chars:
            self.halve()

    def halve(self) -> None:
        fewer = [row for row in self.rows if row["hash"] % (2 * self._nth_prompt) == 0]
        if len({row["hash"] for row in fewer}) >= FEW_PROMPTS:
            self._nth_prompt *= 2
        else:
            self._nth_row *= 2
            fewer = [row for row in self.rows if row["number"] % self._nth_row == 0]
        self.rows, self._chars = fewer, sum(map(_chars, fewer))

    def table(self) -> dict[str, Any]:
        """Columns and rows, a prompt as an index into `prompts`; `left_out` says what is missing."""
        prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(row["prompt"] for row in self.rows))}
        names = list(dict.fromkeys(name for row in self.rows for name in row["rewards"]))
        names = names if len(names) > 1 else []  # one alone is the reward
        rows = [
            [row[key] if key != "prompt" else prompts[row[key]] for key in COLUMNS]
            + [row["rewards"].get(name) for name in names]
            for row in self.rows
        ]
        kept = {
            "one prompt in {:,}, in all of its steps": self._nth_prompt,
            "one sample in {:,}": self._nth_row,
        }
        left_out = "; ".join(what.format(n) for what, n in kept.items() if n > 1)
        return {
            "columns": [*COLUMNS, *names],
            "prompts": list(prompts),
            "rows": rows,
            "total": self.total,
            "left_out": left_out,
        }


def _items(rollout: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    value = rollout.get(key)
    return list(value.items()) if isinstance(value, dict) else []


def _shortened(text: str) -> str:
    """Beginning and end of a text that is too long."""
    half = MAX_TEXT // 2
    cut = len(text) - 2 * half
    return text if cut <= 0 else f"{text[:half]}\n[... {cut:,} characters left out ...]\n{text[-half:]}"


def _chars(row: Mapping[str, Any]) -> int:
    return len(row["prompt"]) + len(row["completion"]) + len(row["note"]) + 60
