"""From the words of a command line to a checked Run, with a line for every mistake on the way.

Hydra stops at the first mistake, and its advice for a misspelt key is to add it with '+'. So each
word is checked against the dataclasses, each chosen YAML file too, and Hydra composes what is left.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin

from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    InterpolationValidationError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)
from yaml import YAMLError

from rlswitch.command.checks import problems
from rlswitch.config.fields import TYPES, Leaf, did_you_mean, field_problems, leaves_of, nearest_key
from rlswitch.errors import ConfigError
from rlswitch.run import MANDATORY, OPTIONS, Run, register, settings_of
from rlswitch.text import first_line

GROUPS = ("recipe", *OPTIONS)
SHORT_FORMS = {"model": "model.path", "data": "data.path"}
FREE_KEYS = ("engine.vllm", "trainer.lr_schedule_kwargs")
"""The mappings that take any key: what is in them is checked by whom it is for."""
SIGNS = {OverrideType.CHANGE: "", OverrideType.ADD: "+", OverrideType.FORCE_ADD: "++"}
SIGNS[OverrideType.DEL] = "~"
COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, OSError, ValueError)
"""What Hydra and OmegaConf raise for files and words that they cannot make sense of."""


@dataclass(kw_only=True, slots=True)
class Source:
    """Where the YAML files lie."""

    conf: Path
    extra: Path | None = None
    """--config-dir: recipes and algorithm variants of the user's own."""
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
            known = sorted(file.stem for file in self.conf.glob("*.yaml"))
            near = did_you_mean(self.name, known)
            yield f"--config-name = {self.name}: no such file in conf{near}"

    @contextmanager
    def loader(self, recipe: str | None = None) -> Iterator[ConfigLoader]:
        """Hydra, initialised on these folders."""
        register(recipe)
        with initialize_config_dir(str(self.conf), job_name="rlswitch", version_base="1.3"):
            yield GlobalHydra.instance().config_loader()

    @property
    def words(self) -> list[str]:
        return [f"hydra.searchpath=[{quoted(f'file://{self.extra}')}]"] if self.extra else []


@dataclass(kw_only=True, slots=True)
class Setting:
    """One override with its key in full: `model=x` is `model.path`, `x` here."""

    sign: str
    """What stood before the key: nothing, +, ++ or ~."""
    key: str
    text: str
    """The value as typed, in brackets where a list is meant."""
    parsed: Override

    @property
    def word(self) -> str:
        """For Hydra, which takes new keys with a sign only."""
        return f"{'++' if self.is_free else self.sign}{self.key}={self.text}"

    @property
    def value(self) -> Any:
        """As a person would say it in Python: a scalar for a list is a list of one."""
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

    @property
    def is_hydra(self) -> bool:
        return self.parsed.is_hydra_override()

    def says(self, problem: str) -> str:
        return f"{self.sign}{self.key} = {self.text}: {problem}"


@dataclass(kw_only=True, slots=True)
class Plan:
    """What of a command line can be composed, and what is wrong with the rest."""

    settings: list[Setting]
    leaves: dict[str, Leaf]
    problems: list[str] = field(default_factory=list)
    choices_known: bool = True
    """False when a recipe or an option cannot be read: what it would have set is then unknown."""

    @property
    def words(self) -> list[str]:
        return [setting.word for setting in self.settings]


def compose_run(words: Iterable[str], source: Source) -> Run:
    """The checked Run. Raises ConfigError with every problem there is."""
    with planned(words, source) as plan:
        wrong = plan.problems
        try:
            config = compose(source.name, [*source.words, *plan.words])
        except COMPOSE_ERRORS as error:
            raise ConfigError(*unique([*wrong, _one_line(error)])) from error
    missing, unusable = _fill_unusable(config, plan.leaves)
    run: Any = OmegaConf.to_object(config)
    if plan.choices_known:
        wrong += [*missing, *unusable, *problems(run)]
    else:
        wrong += [*unusable, *field_problems(run)]
    if wrong:
        raise ConfigError(*unique(wrong))
    return run


@contextmanager
def planned(words: Iterable[str], source: Source) -> Iterator[Plan]:
    """Hydra, initialised, and what of the words of one run it can compose."""
    settings, wrong = read(words, source)
    wrong += [_not_a_sweep(item) for item in settings if item.is_sweep]
    with source.loader(_recipe(settings)) as loader:
        plan = _examine([item for item in settings if not item.is_sweep], source, loader)
        plan.problems = wrong + plan.problems
        yield plan


def read(words: Iterable[str], source: Source) -> tuple[list[Setting], list[str]]:
    """The words that can be parsed, short forms written out, and a line for each that cannot.

    Raises ConfigError when there is no configuration to read them against.
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
            advice = f"quotes make any value readable: {key}={quoted(value)}"
            wrong.append(f"'{word}': cannot be read as key=value; {advice}")
    return settings, wrong


def _examine(settings: list[Setting], source: Source, loader: ConfigLoader) -> Plan:
    """Checks keys, types, choices and the chosen YAML files, without composing anything."""
    choices = [item for item in settings if item.is_choice]
    others = [item for item in settings if not item.is_choice]
    wrong = [line for item in choices if (line := _choice_problem(item, source, loader))]
    leaves: dict[str, Leaf] = {}
    if not wrong:
        leaves, wrong = _read_files(choices, source, loader)
    if choices_known := not wrong:
        lines = [_setting_problem(item, leaves) for item in others]
    else:
        choices, accepted = [], settings_of()
        leaves, broken = _read_files(choices, source, loader)
        if broken:  # the primary file itself: there is nothing to check against
            raise ConfigError(*unique(wrong + broken))
        lines = [_setting_problem(item, accepted) for item in others]
    good = [item for item, line in zip(others, lines, strict=True) if not line]
    good = [item for item in good if item.is_hydra or item.is_free or item.key in leaves]
    return Plan(
        settings=[*choices, *good],
        leaves=leaves,
        problems=[*wrong, *filter(None, lines)],
        choices_known=choices_known,
    )


def quoted(value: str) -> str:
    """`value` as Hydra's grammar takes it whatever it holds."""
    return QuotedString(text=value, quote=Quote.single).with_quotes()


def _setting(parsed: Override, text: str, leaves: dict[str, Leaf]) -> Setting:
    key = parsed.key_or_group if parsed.package is None else parsed.get_key_element().lstrip("+~")
    sign = SIGNS[parsed.type]
    if key in SHORT_FORMS and not isinstance(parsed.value(), dict):
        key = SHORT_FORMS[key]
    if key in leaves and get_origin(leaves[key].annotation) is list:
        text = _as_list(parsed, text)
    return Setting(sign=sign, key=key, text=text, parsed=parsed)


def _as_list(parsed: Override, text: str) -> str:
    """`wandb` -> `[wandb]`, and each value of a sweep; lists, null and ${...} stay as they are."""
    if parsed.is_sweep_override():
        if not parsed.is_choice_sweep():
            return text
        return ",".join(
            item if item.startswith("[") else f"[{item}]" for item in parsed.sweep_string_iterator()
        )
    value = parsed.value()
    is_scalar = value is not None and not isinstance(value, list | dict) and "${" not in str(value)
    return f"[{text}]" if is_scalar and text else text


def _recipe(settings: Iterable[Setting]) -> str | None:
    values = [item.parsed.value() for item in settings if item.key == "recipe"]
    return values[-1] if values and isinstance(values[-1], str) else None


def _read_files(
    choices: list[Setting], source: Source, loader: ConfigLoader
) -> tuple[dict[str, Leaf], list[str]]:
    """The keys there are with these choices, and what is wrong in the YAML files they name."""
    words = [*source.words, *(item.word for item in choices)]
    try:
        chosen = loader.compute_defaults_list(source.name, words, RunMode.RUN).defaults
    except COMPOSE_ERRORS as error:
        files = filter(None, (source.file(f"{it.key}/{it.value}") for it in choices))
        return {}, [": ".join([*map(_shown, files), _one_line(error)])]
    leaves, wrong = settings_of([default.config_path for default in chosen]), []
    for default in chosen:
        file = source.file(default.config_path)
        if file and not default.config_path.startswith("hydra/"):
            tree: Any = OmegaConf.to_container(OmegaConf.load(file))
            if not isinstance(tree, dict) or default.package == "recipe":
                advice = "must start with '# @package _global_' and map keys to values"
                wrong.append(f"{_shown(file)}: {advice}")
                continue
            tree = {key: value for key, value in tree.items() if key not in ("defaults", "hydra")}
            prefix = f"{default.package}." if default.package else ""
            wrong += [f"{_shown(file)}: {it}" for it in _tree_problems(tree, prefix, leaves)]
    return leaves, wrong


def _shown(file: Path) -> str:
    """As short as it can be: from here if it lies below, else in full."""
    return str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file)


def _tree_problems(tree: dict[str, Any], prefix: str, leaves: dict[str, Leaf]) -> Iterator[str]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in leaves:
            mismatch = None if value == "???" else leaves[key].mismatch(value)
            if mismatch:
                yield f"{key} = {value}: {mismatch}"
        elif isinstance(value, dict):
            yield from _tree_problems(value, f"{key}.", leaves)
        elif key in OPTIONS:
            yield f"{key} = {value}: belongs in the defaults list: - override /{key}: {value}"
        else:
            yield f"{key} = {value}: {_unknown(key, leaves)}"


def _choice_problem(item: Setting, source: Source, loader: ConfigLoader) -> str | None:
    group, value = item.key, item.parsed.value()
    known = loader.get_group_options(group) if item.is_hydra else source.options(group)
    available = f"(available: {', '.join(known) or 'none'})"
    if item.sign:
        return item.says(f"write {group}=NAME {available}")
    if value in known:
        return None
    return item.says(f"there is no such {group}{did_you_mean(str(value), known)} {available}")


def _setting_problem(item: Setting, leaves: dict[str, Leaf]) -> str | None:
    if item.is_hydra:
        return None
    if item.sign == "~":
        return f"~{item.key}: a setting cannot be removed; give it another value"
    leaf = leaves.get(item.key)
    if leaf is None:
        return None if item.is_free else item.says(_unknown(item.key, leaves, added="+" in item.sign))
    if item.sign == "+" and not item.is_free:
        return item.says(f"is a setting already; write {item.key}={item.text}")
    mismatch = leaf.mismatch(item.value)
    return item.says(mismatch) if mismatch else None


def _unknown(key: str, leaves: dict[str, Leaf], added: bool = False) -> str:
    section = [known for known in leaves if known.startswith(f"{key}.")]
    if section:
        return f"a section, not a setting; set its keys one by one, such as {section[0]}"
    owners = [
        f"{group}={name}"
        for group, options in OPTIONS.items()
        for name, option in options.items()
        if key in leaves_of(option, f"{group}.")
    ]
    if owners:
        return f"a setting of {', '.join(owners)} only"
    extra = f" ('+' makes new keys under {' and '.join(FREE_KEYS)} only)" if added else ""
    return f"unknown setting{extra}{nearest_key(key, [*leaves, *GROUPS])}"


def _not_a_sweep(item: Setting) -> str:
    if item.text.startswith("["):
        bare = item.text.replace("[", "").replace("]", "")
        advice = f"write {item.key}=[{bare}] for a list, or add -m to try each"
        return f"{item.key} = {bare}: several values; {advice}"
    return item.says("several values; add -m to try each, or put the value in quotes if it is one")


def _fill_unusable(config: DictConfig, leaves: dict[str, Leaf]) -> tuple[list[str], list[str]]:
    """Lines for the values that are missing, and for those that cannot be resolved.

    They get a stand-in, so that the remaining settings can still be checked.
    """
    missing, unusable = [], []
    for key, leaf in leaves.items():
        section = OmegaConf.select(config, key.rpartition(".")[0]) if "." in key else config
        raw: Any = OmegaConf.to_container(section)
        try:
            value = section[leaf.name]
            if OmegaConf.is_config(value):
                OmegaConf.to_container(value, resolve=True)
            if value or key not in MANDATORY:
                continue
            missing.append(f"{key}: not set; set {key}=<{MANDATORY[key]}>")
        except MissingMandatoryValue:
            missing.append(f"{key}: not set; set {key}=<{MANDATORY[key]}>")
        except OmegaConfBaseException as error:
            unusable.append(f"{key} = {raw[leaf.name]}: {_why_unresolved(error, leaf)}")
        defaults: Any = OmegaConf.to_container(OmegaConf.structured(leaf.owner))
        section[leaf.name] = "stand-in" if key in MANDATORY else defaults[leaf.name]
    return missing, unusable


def _why_unresolved(error: OmegaConfBaseException, leaf: Leaf) -> str:
    if variable := re.search(r"Environment variable '([^']*)' not found", str(error)):
        name = variable[1]
        return f"environment variable {name} is not set; set it, or use ${{oc.env:{name},DEFAULT}}"
    if isinstance(error, InterpolationValidationError):
        return f"must be {TYPES[leaf.annotation]}"
    return f"cannot be resolved: {first_line(error)}"


def _one_line(error: Exception) -> str:
    """What Hydra, OmegaConf or YAML said, less the search path and the name of the primary file."""
    text = str(error.__cause__ or error).partition("Config search path:")[0]
    return " ".join(re.sub(r"^In '[^']*': ", "", text).split())


def unique(lines: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(lines))
