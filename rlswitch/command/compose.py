"""From the words of a command line to a checked Run, with a line for every mistake.

Hydra stops at the first mistake, and for a misspelt key it advises to add the key with '+'. So every word and
every chosen YAML file is checked against the dataclasses first, and Hydra composes the words that are right.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, get_origin

from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Quote, QuotedString, Sweep
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationValidationError, OmegaConfBaseException
from yaml import YAMLError

from rlswitch.command.checks import problems
from rlswitch.config.fields import TYPES, Leaf, did_you_mean, leaves_of, nearest_key
from rlswitch.errors import ConfigError
from rlswitch.run import MANDATORY, OPTIONS, Run, register, settings_of
from rlswitch.text import first_line

GROUPS = ("recipe", *OPTIONS)
SHORT_FORMS = {"model": "model.path", "data": "data.path"}
FREE_KEYS = ("engine.vllm", "trainer.lr_schedule_kwargs")
"""Mappings with free keys: vLLM and transformers check them."""
SIGNS = {OverrideType.CHANGE: "", OverrideType.ADD: "+", OverrideType.FORCE_ADD: "++", OverrideType.DEL: "~"}
COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, OSError, ValueError)
"""What Hydra and OmegaConf raise for invalid files and words."""
NOT_IN_DIRECTORY_NAME = {"recipe", "num_steps", "resume", "mode", "output_dir"}
DIRECTORY_NAME_LENGTH = 100
Leaves = dict[str, Leaf]


@dataclass(kw_only=True, slots=True)
class Source:
    """Where the YAML files are."""

    conf: Path
    extra: Path | None = None
    """--config-dir: the user's recipes and algorithm variants."""
    name: str = "train"

    @classmethod
    def default(cls) -> Source:
        """conf/ beside the package in a checkout, inside the package when installed."""
        package = Path(__file__).resolve().parents[1]
        beside = package.parent / "conf"
        return cls(conf=beside if (beside / "train.yaml").is_file() else package / "conf")

    @property
    def folders(self) -> list[Path]:
        return [self.conf, self.extra] if self.extra else [self.conf]

    def file(self, config: str) -> Path | None:
        files = (folder / f"{config}.yaml" for folder in self.folders)
        return next((file for file in files if file.is_file()), None)

    def options(self, group: str) -> list[str]:
        files = {file.stem for folder in self.folders for file in (folder / group).glob("*.yaml")}
        return sorted(files | set(OPTIONS.get(group, ())))

    def problems(self) -> Iterator[str]:
        for folder in self.folders:
            if not folder.is_dir():
                yield f"configuration directory {folder}: does not exist"
        if self.file(self.name) is None:
            near = did_you_mean(self.name, sorted(file.stem for file in self.conf.glob("*.yaml")))
            yield f"--config-name = {self.name}: no such file in conf{near}"

    @contextmanager
    def loader(self, recipe: str | None = None) -> Iterator[ConfigLoader]:
        """Initialises Hydra on these folders."""
        register(recipe)
        with initialize_config_dir(str(self.conf), job_name="rlswitch", version_base="1.3"):
            yield GlobalHydra.instance().config_loader()

    @property
    def words(self) -> list[str]:
        return [f"hydra.searchpath=[{quoted(f'file://{self.extra}')}]"] if self.extra else []


@dataclass(kw_only=True, slots=True)
class Setting:
    """One override with its full key: `model=x` has the key `model.path`."""

    sign: str
    """What the user typed before the key: nothing, +, ++ or ~."""
    key: str
    text: str
    """The value as typed, in brackets if the setting is a list."""
    parsed: Override

    @property
    def word(self) -> str:
        """For Hydra, which takes new keys only with a sign."""
        return f"{'++' if self.is_free else self.sign}{self.key}={self.text}"

    @property
    def value(self) -> Any:
        """The Python value: a scalar given for a list is a list of one."""
        value = self.parsed.value()
        return [value] if self.text.startswith("[") and not isinstance(value, list) else value

    @property
    def is_sweep(self) -> bool:
        return self.parsed.is_sweep_override()

    @property
    def is_choice(self) -> bool:
        return self.key in GROUPS or self.key.startswith("hydra/")

    @property
    def is_free(self) -> bool:
        return f"{self.key}.".startswith(tuple(f"{free}." for free in FREE_KEYS))

    def line(self, problem: str) -> str:
        return f"{self.sign}{self.key} = {self.text}: {problem}"


def compose_run(words: Iterable[str], source: Source) -> Run:
    """The checked run. Raises ConfigError with all mistakes at once."""
    with examined(words, source) as (settings, leaves, wrong):
        try:
            config = compose(source.name, [*source.words, *(item.word for item in settings)])
        except COMPOSE_ERRORS as error:
            raise ConfigError(*wrong, _one_line(error)) from error
    if unresolved := list(_unresolved_problems(config, leaves)):
        raise ConfigError(*wrong, *unresolved)
    run: Any = OmegaConf.to_object(config)
    if wrong := [*wrong, *problems(run)]:
        raise ConfigError(*dict.fromkeys(wrong))
    return replace(run, output_dir=run.output_dir or default_output_dir(run, settings))


def hydra_words(words: Iterable[str], source: Source) -> list[str]:
    """The words with their full keys, for Hydra's own entry point. Raises ConfigError."""
    with examined(words, source) as (settings, _, wrong):
        if wrong:
            raise ConfigError(*wrong)
    return [item.word for item in settings]


@contextmanager
def examined(words: Iterable[str], source: Source) -> Iterator[tuple[list[Setting], Leaves, list[str]]]:
    """The settings that Hydra can compose, every known key, and a line for each mistake; initialises Hydra.

    Raises ConfigError if a recipe, an option or a YAML file is wrong: what it would set is unknown.
    """
    settings, wrong = read(words, source)
    wrong += [_not_a_sweep(item) for item in settings if item.is_sweep]
    choices = [item for item in settings if item.is_choice and not item.is_sweep]
    others = [item for item in settings if not item.is_choice and not item.is_sweep]
    recipe = next((str(item.parsed.value()) for item in reversed(settings) if item.key == "recipe"), None)
    with source.loader(recipe) as loader:
        leaves = settings_of()
        unknown = [line for item in choices if (line := _choice_problem(item, source, loader))]
        if not unknown:
            leaves, unknown = _read_files(choices, source, loader)
        lines = [_setting_problem(item, leaves) for item in others]
        wrong = list(dict.fromkeys([*wrong, *unknown, *filter(None, lines)]))
        if unknown:
            raise ConfigError(*wrong)
        yield [*choices, *(it for it, line in zip(others, lines, strict=True) if not line)], leaves, wrong


def read(words: Iterable[str], source: Source) -> tuple[list[Setting], list[str]]:
    """The words that can be parsed, short forms expanded, and a line for each of the others.

    Raises ConfigError if there is no configuration to read them against.
    """
    if wrong := list(source.problems()):
        raise ConfigError(*wrong)
    settings, parser, leaves = [], OverridesParser.create(), settings_of()
    for word in words:
        key, equals, value = word.partition("=")
        if not equals and not word.startswith("~"):
            wrong.append(f"'{word}': expected key=value")
            continue
        try:
            settings.append(_setting(parser.parse_override(word), value, leaves))
        except HydraException:
            advice = f"put the value in quotes: {key}={quoted(value)}"
            wrong.append(f"'{word}': cannot be parsed as key=value; {advice}")
    return settings, wrong


def default_output_dir(run: Run, settings: Iterable[Setting]) -> str:
    """runs/<recipe> and what differs from it, so that the same command finds its checkpoints again."""
    named = {}
    for item in settings:
        if item.key not in NOT_IN_DIRECTORY_NAME and not item.parsed.is_hydra_override():
            value = item.text if item.is_choice or item.is_free else attrgetter(item.key)(run)
            named[item.key] = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    text = "-".join([run.recipe or "run", *(f"{key}={named[key]}" for key in sorted(named))])
    name = re.sub(r"[^A-Za-z0-9._=,+-]", "_", text)
    if len(name) > DIRECTORY_NAME_LENGTH:
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        name = f"{name[: DIRECTORY_NAME_LENGTH - 1 - len(digest)]}-{digest}"
    return f"runs/{name}"


def quoted(value: str) -> str:
    """`value` in quotes, so that Hydra's grammar takes it literally."""
    return QuotedString(text=value, quote=Quote.single).with_quotes()


def _setting(parsed: Override, text: str, leaves: Leaves) -> Setting:
    key = parsed.key_or_group if parsed.package is None else parsed.get_key_element().lstrip("+~")
    if key in SHORT_FORMS and not isinstance(parsed.value(), dict):
        key = SHORT_FORMS[key]
    if key in leaves and get_origin(leaves[key].annotation) is list:
        text = _as_list(parsed, text)
    return Setting(sign=SIGNS[parsed.type], key=key, text=text, parsed=parsed)


def _as_list(parsed: Override, text: str) -> str:
    """`wandb` -> `[wandb]`, and so each value of a sweep; lists, null and ${...} stay as they are."""
    if parsed.is_choice_sweep():
        values = parsed.sweep_string_iterator()
        return ",".join(item if item.startswith("[") else f"[{item}]" for item in values)
    value = parsed.value()
    stays = not text or value is None or isinstance(value, list | dict | Sweep) or "${" in str(value)
    return text if stays else f"[{text}]"


def _read_files(choices: list[Setting], source: Source, loader: ConfigLoader) -> tuple[Leaves, list[str]]:
    """The keys that exist with these choices, and what is wrong in the YAML files that they name."""
    words = [*source.words, *(item.word for item in choices)]
    try:
        chosen = loader.compute_defaults_list(source.name, words, RunMode.RUN).defaults
    except COMPOSE_ERRORS as error:
        files = filter(None, (source.file(f"{it.key}/{it.value}") for it in choices))
        return settings_of(), [": ".join([*map(_shown, files), _one_line(error)])]
    leaves, wrong = settings_of([default.config_path for default in chosen]), []
    for default in chosen:
        file = source.file(default.config_path)
        if file is None or default.config_path.startswith("hydra/"):
            continue
        tree: Any = OmegaConf.to_container(OmegaConf.load(file))
        if not isinstance(tree, dict) or default.package == "recipe":
            wrong.append(f"{_shown(file)}: must start with '# @package _global_' and map keys to values")
            continue
        tree = {key: value for key, value in tree.items() if key not in ("defaults", "hydra")}
        prefix = f"{default.package}." if default.package else ""
        wrong += [f"{_shown(file)}: {line}" for line in _tree_problems(tree, prefix, leaves)]
    return leaves, wrong


def _shown(file: Path) -> str:
    """Relative to the working directory if it lies below."""
    return str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file)


def _tree_problems(tree: dict[str, Any], prefix: str, leaves: Leaves) -> Iterator[str]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in leaves:
            problem = None if value == "???" else leaves[key].problem(value)
        elif isinstance(value, dict):
            yield from _tree_problems(value, f"{key}.", leaves)
            continue
        elif key in OPTIONS:
            problem = f"belongs in the defaults list: - override /{key}: {value}"
        else:
            problem = _unknown(key, leaves)
        if problem:
            yield f"{key} = {value}: {problem}"


def _choice_problem(item: Setting, source: Source, loader: ConfigLoader) -> str | None:
    group, value = item.key, item.parsed.value()
    known = loader.get_group_options(group) if item.parsed.is_hydra_override() else source.options(group)
    available = f"(available: {', '.join(known) or 'none'})"
    if item.sign:
        return item.line(f"write {group}=NAME {available}")
    if value in known:
        return None
    return item.line(f"there is no such {group}{did_you_mean(str(value), known)} {available}")


def _setting_problem(item: Setting, leaves: Leaves) -> str | None:
    if item.parsed.is_hydra_override():
        return None
    if item.sign == "~":
        return f"~{item.key}: a setting cannot be removed; give it another value"
    leaf = leaves.get(item.key)
    if leaf is None:
        return None if item.is_free else item.line(_unknown(item.key, leaves, added="+" in item.sign))
    if item.sign == "+" and not item.is_free:
        return item.line(f"is a setting already; write {item.key}={item.text}")
    return item.line(problem) if (problem := leaf.problem(item.value)) else None


def _unknown(key: str, leaves: Leaves, added: bool = False) -> str:
    if inner := next((known for known in leaves if known.startswith(f"{key}.")), None):
        return f"a section, not a setting; set its keys one by one, such as {inner}"
    owners = [
        f"{group}={name}"
        for group, options in OPTIONS.items()
        for name, option in options.items()
        if key in leaves_of(option, f"{group}.")
    ]
    if owners:
        return f"a setting of {', '.join(owners)} only"
    plus = f" ('+' adds keys only under {' and '.join(FREE_KEYS)})" if added else ""
    return f"unknown setting{plus}{nearest_key(key, [*leaves, *GROUPS])}"


def _not_a_sweep(item: Setting) -> str:
    if item.text.startswith("["):
        bare = re.sub(r"[][]", "", item.text)
        return f"{item.key} = {bare}: several values; write {item.key}=[{bare}], or add -m to try each"
    return item.line("several values; add -m to try each, or quote the value if it is one")


def _unresolved_problems(config: DictConfig, leaves: Leaves) -> Iterator[str]:
    """A line for each value that is missing or cannot be resolved."""
    for key, leaf in leaves.items():
        try:
            value = OmegaConf.select(config, key)  # None if it is missing
            if OmegaConf.is_config(value):
                OmegaConf.to_container(value, resolve=True)
        except OmegaConfBaseException as error:
            raw: Any = OmegaConf.to_container(OmegaConf.select(config, key.rpartition(".")[0]))
            yield f"{key} = {raw[leaf.name]}: {_why_unresolved(error, leaf)}"
        else:
            if key in MANDATORY and not value:
                yield f"{key}: not set; set {key}=<{MANDATORY[key]}>"


def _why_unresolved(error: OmegaConfBaseException, leaf: Leaf) -> str:
    if variable := re.search(r"Environment variable '([^']*)' not found", str(error)):
        name = variable[1]
        return f"environment variable {name} is not set; set it, or use ${{oc.env:{name},DEFAULT}}"
    if isinstance(error, InterpolationValidationError):
        return f"must be {TYPES[leaf.annotation]}"
    return f"cannot be resolved: {first_line(error)}"


def _one_line(error: Exception) -> str:
    """The message of Hydra, OmegaConf or YAML without the search path and the name of the primary file."""
    text = str(error.__cause__ or error).partition("Config search path:")[0]
    return " ".join(re.sub(r"^In '[^']*': ", "", text).split())
