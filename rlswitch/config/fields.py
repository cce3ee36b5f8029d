"""Field declarations that carry their own range, and the walk that checks them.

    lr: float = number(1e-6, above=0)
    transport: str = choice("auto", "shm", "disk")       # the first one is the default

Bounds live beside the default, so the check and the documentation cannot drift apart.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, TypeVar, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlswitch.errors import ConfigError

T = TypeVar("T")


def number(
    default: float | None,
    *,
    above: float | None = None,
    below: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A numeric field with its bounds; `above` and `below` are strict."""
    bounds = {"above": above, "below": below, "at_least": at_least, "at_most": at_most}
    return field(default=default, metadata={"bounds": bounds})


def choice(default: str, *others: str) -> Any:
    """A string field with a fixed set of values."""
    return field(default=default, metadata={"choices": (default, *others)})


def field_problems(node: Any, prefix: str = "") -> Iterator[str]:
    """A line for every field under `node` that is out of its bounds, not finite or not a choice."""
    for item in fields(node):
        value, key = getattr(node, item.name), f"{prefix}{item.name}"
        if is_dataclass(value):
            yield from field_problems(value, f"{key}.")
        else:
            yield from _value_problems(key, value, item.metadata)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest known word, or nothing when none is near."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


@dataclass(kw_only=True, slots=True)
class Leaf:
    """The dataclass field behind a dotted key."""

    owner: type
    name: str
    annotation: Any

    def mismatch(self, value: Any) -> str | None:
        """What type the value must have, if it does not: OmegaConf decides, except that true is not text."""
        if _is_reference(value):
            return None
        if self.annotation in (str, str | None) and isinstance(value, bool):
            return "must be text; put it in quotes"
        try:
            OmegaConf.structured(self.owner)[self.name] = value
        except OmegaConfBaseException:
            return f"must be {TYPES[self.annotation]}"
        return None

    def problem(self, key: str, value: Any) -> str | None:
        """The line for a value of the right type that is out of bounds or not a choice."""
        if _is_reference(value):
            return None
        config = OmegaConf.structured(self.owner)
        config[self.name] = value
        metadata = next(item.metadata for item in fields(self.owner) if item.name == self.name)
        return next(_value_problems(key, config[self.name], metadata), None)


def _is_reference(value: Any) -> bool:
    """Whether its value is known, and can be checked, only once composed."""
    return isinstance(value, str) and "${" in value


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
"""What a user calls each type that a setting can have."""


def leaves_of(owner: type, prefix: str = "") -> dict[str, Leaf]:
    """The fields under `owner` by dotted key; nested dataclasses are walked into."""
    found: dict[str, Leaf] = {}
    annotations = get_type_hints(owner)
    for item in fields(owner):
        key, annotation = f"{prefix}{item.name}", annotations[item.name]
        if isinstance(annotation, type) and is_dataclass(annotation):
            found |= leaves_of(annotation, f"{key}.")
        else:
            found[key] = Leaf(owner=owner, name=item.name, annotation=annotation)
    return found


def settings_from_words(owner: type[T], words: Iterable[str]) -> T:
    """`owner` as `key=value` words set it; a list is `a,b`. Raises ConfigError with a line per mistake."""
    known, problems = leaves_of(owner), list[str]()
    values: dict[str, Any] = {}
    for word in words:
        key, sign, text = word.partition("=")
        if key not in known or not sign:
            what = f"{word}: unknown setting" if sign else f"{word}: expected key=value"
            problems.append(f"{what}{did_you_mean(key, known)} (there is: {', '.join(known)})")
            continue
        leaf = known[key]
        if leaf.annotation == list[str]:
            values[key] = [item for item in text.strip("[]").split(",") if item]
        else:
            values[key] = text if leaf.annotation is str else yaml.safe_load(text)
        if fault := leaf.mismatch(values[key]):
            problems.append(f"{word}: {fault}")
    if not problems:
        problems = list(field_problems(owner(**values)))
    if problems:
        raise ConfigError(*problems)
    return owner(**values)


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


def _value_problems(key: str, value: Any, metadata: Mapping[str, Any]) -> Iterator[str]:
    choices = metadata.get("choices")
    if choices and value not in choices:
        yield f"{key} = {value}: not one of {', '.join(choices)}{did_you_mean(str(value), choices)}"
    elif isinstance(value, int | float) and not isinstance(value, bool):
        bounds = metadata.get("bounds", {}) if math.isfinite(value) else {}
        if not math.isfinite(value):
            yield f"{key} = {value}: must be a finite number"
        for name, limit in bounds.items():
            words, holds = BOUNDS[name]
            if limit is not None and not holds(value, limit):
                yield f"{key} = {value}: must be {words} {limit:g}"


BOUNDS = {
    "above": ("greater than", operator.gt),
    "below": ("less than", operator.lt),
    "at_least": ("at least", operator.ge),
    "at_most": ("at most", operator.le),
}
