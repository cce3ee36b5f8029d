"""A command line, taken apart, and Hydra's own entry point for what is Hydra's."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser

from rlswitch.command.compose import Source
from rlswitch.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class Arguments:
    """A command line, taken apart."""

    overrides: list[str]
    flags: list[str]
    """Everything else, for Hydra."""
    source: Source
    multirun: bool
    is_question: bool
    """--help, --cfg, --info and the like: Hydra answers, nothing is trained."""
    about_hydra: bool
    """--hydra-help and --shell-completion: the overrides are not ours."""


def parse(words: Sequence[str]) -> Arguments:
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]  # argparse would print its usage, which lists none of our settings
    given = parser.parse_intermixed_args(list(words))
    if given.config_path or given.experimental_rerun:
        raise ConfigError(
            "--config-path, --experimental-rerun: not supported; --config-dir DIR adds to conf/"
        )
    source = Source.default()
    source.name = given.config_name or source.name
    source.extra = Path(given.config_dir).absolute() if given.config_dir else None
    about_hydra = given.hydra_help or given.shell_completion
    return Arguments(
        overrides=given.overrides,
        flags=[word for word in words if word not in given.overrides],
        source=source,
        multirun=given.multirun or "hydra.mode=MULTIRUN" in given.overrides,
        is_question=bool(given.help or given.cfg or given.info or about_hydra),
        about_hydra=about_hydra,
    )


def run_hydra(task: Callable[[Any], Any], words: list[str], arguments: Arguments) -> int:
    """Hydra's own entry point on `words`: its launchers, sweepers and plugins all work."""
    source, command_line = arguments.source, sys.argv
    sys.argv = [command_line[0], *words, *arguments.flags]
    try:
        hydra.main(version_base="1.3", config_path=str(source.conf), config_name=source.name)(task)()
    except SystemExit as stop:  # Hydra has said why
        return int(bool(stop.code))
    finally:
        sys.argv = command_line
    return 0


def refuse_broken_environment() -> None:
    """Raises ConfigError where importing torch or vLLM is known to fail, or where we are one of many."""
    from rlswitch.command.environment import check_environment

    wrong = check_environment()
    if (processes := os.environ.get("WORLD_SIZE") or "1") != "1":  # accelerate launch, torchrun
        wrong.append(
            f"WORLD_SIZE = {processes}: a run trains in one process, {processes} of them would write the same"
            " files; start it with `python train.py`, and unset WORLD_SIZE"
        )
    if wrong:
        raise ConfigError(*wrong)


def _refuse(message: str) -> NoReturn:
    raise ConfigError(message)
