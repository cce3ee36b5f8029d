"""The entry point of the programs in scripts/: validates settings before it imports torch or vLLM."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

from rlswitch.benchmarks.settings import settings_from_words

from rlswitch.command.cli import guarded
from rlswitch.errors import ConfigError
from rlswitch.processes.exit import DONE, leave
from rlswitch.processes.fork_server import prepare


def run(
    doc: str | None,
    settings_type: type,
    module: str,
    function: str,
    problems: Callable[[Any], Iterable[str]] = lambda settings: (),
    warm: bool = True,
) -> None:
    """Calls rlswitch.benchmarks.`module`.`function`(settings) and exits with the code that it returns.

    `problems` yields a line for each mistake that the bounds of single fields cannot catch. `warm` starts the
    fork server while the module is imported.
    """

    def command() -> int:
        if {"-h", "--help"} & set(sys.argv):
            print(doc)
            return DONE
        settings: Any = settings_from_words(settings_type, sys.argv[1:])
        if wrong := list(problems(settings)):
            raise ConfigError(*wrong)
        if warm:
            prepare()
        work: Any = importlib.import_module(f"rlswitch.benchmarks.{module}")  # imports torch and vLLM
        return getattr(work, function)(settings)

    leave(guarded(command))
