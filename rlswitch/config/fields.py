"""Field declarations that carry their own range, and the walk that checks them.

    lr: float = number(1e-6, above=0)
    transport: str = choice("auto", "shm", "disk")       # the first one is the default

Bounds stand beside the default, so the check and the documentation cannot drift apart.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

BOUNDS = {
    "above": ("greater than", operator.gt),
    "below": ("less than", operator.lt),
    "at_least": ("at least", operator.ge),
    "at_most": ("at most", operator.le),
}


def number(default: float | None, **bounds: float) -> Any:
    """A numeric field with its bounds: above, below, at_least, at_most."""
    checks = [(*BOUNDS[name], limit) for name, limit in bounds.items()]
    return field(default=default, metadata={"bounds": checks})


def choice(default: str, *others: str) -> Any:
    """A string field with a fixed set of values."""
    return field(default=default, metadata={"choices": (default, *others)})


def field_problems(node: Any, prefix: str = "") -> Iterator[str]:
    """A line for every field under `node` that is out of its bounds, not finite or not a choice."""
    for item in fields(node):
        value, key = getattr(node, item.name), f"{prefix}{item.name}"
        if is_dataclass(value):
            yield from field_problems(value, f"{key}.")
        elif problem := _value_problem(value, item.metadata):
            yield f"{key} = {value}: {problem}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the most similar known word, or nothing."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


@dataclass(kw_only=True, slots=True)
class Leaf:
    """The dataclass field behind a dotted key."""

    owner: type
    name: str
    annotation: Any
    metadata: Mapping[str, Any]

    def problem(self, value: Any) -> str | None:
        """What is wrong with `value`: its type by OmegaConf's rules (but true is not text), or its bounds."""
        if isinstance(value, str) and "${" in value:
            return None  # known, and checked, once composed
        if self.annotation in (str, str | None) and isinstance(value, bool):
            return "must be text; put it in quotes"
        config = OmegaConf.structured(self.owner)
        try:
            config[self.name] = value
        except OmegaConfBaseException:
            return f"must be {TYPES[self.annotation]}"
        return _value_problem(config[self.name], self.metadata)


TYPES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    int | None: "a whole number or null",
    float | None: "a number or null",
    str | None: "text or null",
    list[str]: "a list of text: [a, b], or [] for none",
    list[float]: "a list of numbers: [1, 0.5], or [] for none",
    dict[str, Any]: "a mapping: {key: value}",
}
"""The types that a setting can have, in words."""


def leaves_of(owner: type, prefix: str = "") -> dict[str, Leaf]:
    """The fields under `owner` by dotted key; nested dataclasses are walked into."""
    found: dict[str, Leaf] = {}
    annotations = get_type_hints(owner)
    for item in fields(owner):
        key, annotation = f"{prefix}{item.name}", annotations[item.name]
        if isinstance(annotation, type) and is_dataclass(annotation):
            found |= leaves_of(annotation, f"{key}.")
        else:
            found[key] = Leaf(owner=owner, name=item.name, annotation=annotation, metadata=item.metadata)
    return found


def nearest_key(key: str, known: Iterable[str]) -> str:
    """Like did_you_mean, for dotted keys: the same name in another section comes first."""
    names = {other: other.rpartition(".")[2] for other in known}
    name = key.rpartition(".")[2]
    if name not in names.values():
        if near := did_you_mean(key, names):
            return near
        name = next(iter(get_close_matches(name, names.values(), n=1, cutoff=0.7)), "")
    candidates = [repr(other) for other in names if names[other] == name]
    return f"; did you mean {' or '.join(candidates)}?" if candidates else ""


def _value_problem(value: Any, metadata: Mapping[str, Any]) -> str | None:
    choices = metadata.get("choices")
    if choices and value not in choices:
        return f"not one of {', '.join(choices)}{did_you_mean(str(value), choices)}"
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    if not math.isfinite(value):
        return "must be a finite number"
    bounds = metadata.get("bounds", ())
    return next(
        (f"must be {words} {limit:g}" for words, holds, limit in bounds if not holds(value, limit)), None
    )
