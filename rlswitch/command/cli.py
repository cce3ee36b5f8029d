"""The commands behind train.py: one run, a sweep, and Hydra's questions about the configuration.

Nothing here imports torch or vLLM before the configuration and the files it names are known to be right.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from rlswitch.checkpoint.resume import finished
from rlswitch.command.arguments import INSTALL, Arguments, check_environment, parse, run_hydra
from rlswitch.command.compose import compose_run, hydra_words
from rlswitch.data.rows import reason
from rlswitch.errors import ConfigError, Preempted, ProofError, RLSwitchError
from rlswitch.processes.exit import DONE, FAILED, INTERRUPTED, NOT_PROVEN, PREEMPTED, WRONG_CONFIG, leave
from rlswitch.processes.signals import preemptible
from rlswitch.run import register

DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
DISK_FULL_ADVICE = "free some space and run the same command again (resume=auto once a checkpoint is saved)"
PACKAGE = str(Path(__file__).resolve().parents[1])


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command line `words`, by default this process's, and returns the exit code."""
    return guarded(lambda: dispatch(sys.argv[1:] if words is None else words))


def dispatch(words: Sequence[str]) -> int:
    arguments = parse(words)
    if arguments.multirun:
        from rlswitch.command.sweep import sweep  # imports pandas

        return sweep(arguments, run_job)
    return ask_hydra(arguments) if arguments.is_question else train_once(arguments)


def train_once(arguments: Arguments) -> int:
    with preemptible() as stop_signals:
        run = compose_run(arguments.overrides, arguments.source)
        check_environment()
        if run.mode == "plan":
            from rlswitch.planning.plan import show as show_plan

            show_plan(run)
            return DONE
        from rlswitch.inputs import check_inputs, open_inputs  # imports numpy

        check_inputs(run)
        if run.mode == "train" and (message := finished(run)):
            print(message)
            from rlswitch.report.page import write_report

            assert run.output_dir is not None
            if not Path(run.output_dir, "report.html").exists():  # killed after its last checkpoint
                write_report(Path(run.output_dir))
            return DONE
        with open_inputs(run, print) as inputs:
            if run.mode == "rewards":
                from rlswitch.command.preview import show as show_rewards

                show_rewards(run, inputs)
            else:
                from rlswitch.loop import train

                train(run, inputs, stop_signals)
    return DONE


def run_job(words: list[str]) -> None:
    """One job of a sweep, in its own process."""
    sys.argv[1:] = words  # the run records its command line
    leave(main(words))


def ask_hydra(arguments: Arguments) -> int:
    if arguments.about_hydra:
        words = arguments.overrides
        register()
    else:
        words = hydra_words(arguments.overrides, arguments.source)
    try:
        return WRONG_CONFIG if run_hydra(lambda _config: None, words, arguments) else DONE
    except BrokenPipeError:  # train.py --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def guarded(command: Callable[[], int]) -> int:
    """What `command` returns; for an error its exit code, after printing one line per problem."""
    try:
        return command()
    except ConfigError as error:
        return _report(error.problems, WRONG_CONFIG)
    except Preempted as error:
        _print(f"rlswitch: {error}")
        return PREEMPTED
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if failed_import(error):
            problem = f"{reason(error)}: torch, transformers and vLLM do not fit together; {INSTALL}"
            return _report([problem], WRONG_CONFIG)
        if isinstance(error, RLSwitchError):
            return _report(str(error).splitlines(), NOT_PROVEN if isinstance(error, ProofError) else FAILED)
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return _report([f"{error}; {DISK_FULL_ADVICE}"], FAILED)
        traceback.print_exc()
        return FAILED


def failed_import(error: BaseException | None) -> bool:
    """Whether `error` or one of its causes is a library that could not be imported."""
    while error is not None:
        modules = [it.filename for it in traceback.extract_tb(error.__traceback__) if it.name == "<module>"]
        if isinstance(error, ImportError) or (modules and not modules[-1].startswith(PACKAGE)):
            return True
        error = error.__cause__
    return False


def _report(lines: Iterable[str], code: int) -> int:
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        traceback.print_exc()
    for line in lines:
        _print(f"rlswitch: error: {' '.join(line.split())}")
    return code


def _print(line: str) -> None:
    with suppress(OSError):  # the terminal is gone: the exit code still tells
        print(line, file=sys.stderr)
