"""Parses the command line, and runs Hydra's own entry point for what Hydra does itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser

from rlswitch.command.compose import Source
from rlswitch.errors import ConfigError

INSTALL = (
    "run `make train`, which creates its own environment, or `pip install --no-deps -r requirements/cpu.txt`"
    " (on a CUDA device cuda.txt)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """A parsed command line."""

    overrides: list[str]
    flags: list[str]
    """All words but the overrides, for Hydra."""
    source: Source
    multirun: bool
    is_question: bool
    """--help, --cfg, --info and the like: Hydra answers, nothing is trained."""
    about_hydra: bool
    """--hydra-help and --shell-completion: the overrides are not ours."""


def parse(words: Sequence[str]) -> Arguments:
    """Raises ConfigError for an unknown flag, and for flags of Hydra that are not supported."""
    parser = get_args_parser()
    parser.error = _reject  # type: ignore[method-assign]  # argparse would print its usage, without our settings
    given = parser.parse_intermixed_args(list(words))
    if given.config_path or given.experimental_rerun:
        raise ConfigError("--config-path, --experimental-rerun: not supported; use --config-dir DIR")
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
    """Hydra's own entry point on `words`, so that its launchers, sweepers and plugins work."""
    source, command_line = arguments.source, sys.argv
    sys.argv = [command_line[0], *words, *arguments.flags]
    try:
        hydra.main(version_base="1.3", config_path=str(source.conf), config_name=source.name)(task)()
    except SystemExit as stop:  # Hydra has printed why
        return int(bool(stop.code))
    finally:
        sys.argv = command_line
    return 0


def check_environment() -> None:
    """Raises ConfigError without vLLM, and in one of several processes of a launcher."""
    if find_spec("vllm") is None:
        raise ConfigError(f"vLLM is not installed: nothing could generate; {INSTALL}")
    if (processes := os.environ.get("WORLD_SIZE") or "1") != "1":  # accelerate launch, torchrun
        raise ConfigError(
            f"WORLD_SIZE = {processes}: a run trains in one process, {processes} would overwrite each other's"
            " files; start it with `python train.py`, and unset WORLD_SIZE"
        )


def _reject(message: str) -> NoReturn:
    raise ConfigError(message)
