"""The commands behind train.py: one run, a sweep, and Hydra's questions about the configuration.

Nothing here imports torch or vLLM before configuration and inputs are known to be right.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from rlswitch.checkpoint.resume import finished
from rlswitch.command.arguments import Arguments, parse, refuse_broken_environment, run_hydra
from rlswitch.command.compose import compose_run, planned, read, unique
from rlswitch.command.sweep import sweep
from rlswitch.command.torchless import Torchless
from rlswitch.errors import ConfigError, Preempted, ProofError, RLSwitchError
from rlswitch.processes.exit import DONE, FAILED, INTERRUPTED, NOT_PROVEN, PREEMPTED, WRONG_CONFIG, leave
from rlswitch.processes.fork_server import prepare
from rlswitch.processes.signals import StopSignals, preemptible
from rlswitch.run import Run, register

if TYPE_CHECKING:
    from rlswitch.inputs import Inputs

NOT_IN_DIRECTORY_NAME = {"recipe", "num_steps", "resume", "mode", "output_dir"}
DIRECTORY_NAME_LENGTH = 100
NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
ROOM_HINT = "make room and run the same command again, with resume=auto once it has saved a checkpoint"


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command line `words` (by default this process's) and returns the exit code."""
    return guarded(lambda: dispatch(sys.argv[1:] if words is None else words))


def dispatch(words: Sequence[str]) -> int:
    arguments = parse(words)
    if arguments.multirun:
        return sweep(arguments)
    return ask_hydra(arguments) if arguments.is_question else train_once(arguments)


def guarded(command: Callable[[], int]) -> int:
    """What `command` returns, or the exit code that its error stands for, said in a line for each mistake."""
    try:
        return command()
    except ConfigError as error:
        return _report(error.problems, WRONG_CONFIG)
    except ProofError as error:
        return _report([str(error)], NOT_PROVEN)
    except Preempted as error:
        _tell(f"rlswitch: {error}")
        return PREEMPTED
    except RLSwitchError as error:
        return _report(str(error).splitlines(), FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return _report([f"{error}; {ROOM_HINT}"], FAILED)
        traceback.print_exc()
        return FAILED


def train_once(arguments: Arguments) -> int:
    with preemptible() as stop_signals, closing(Torchless()) as torchless:  # it imports while we look
        run = compose_run(arguments.overrides, arguments.source)
        run.output_dir = run.output_dir or default_output_dir(run, arguments)
        refuse_broken_environment()
        if run.mode == "plan":
            from rlswitch.planning.plan import show

            torchless.close()  # a plan reads no prompts
            show(run)
            return DONE
        from rlswitch.inputs import open_inputs, refuse_wrong_inputs  # numpy comes with it

        refuse_wrong_inputs(run)
        if run.mode == "train" and (said := finished(run)):
            print(said)
            write_missing_report(run)
            return DONE
        with open_inputs(run, torchless, print) as inputs:
            work(run, inputs, stop_signals)
    return DONE


def write_missing_report(run: Run) -> None:
    """A run that was killed when all was saved has none yet."""
    from rlswitch.report.page import write_report

    assert run.output_dir is not None
    if not Path(run.output_dir, "report.html").exists():
        write_report(Path(run.output_dir))


def work(run: Run, inputs: Inputs, stop_signals: StopSignals) -> None:
    if run.engine.fork_server and run.engine.is_started_here:
        prepare()  # it imports while we do; earlier it would only slow a refusal down
    if run.mode == "rewards":
        from rlswitch.command.preview import show

        show(run, inputs)
    else:
        from rlswitch.loop import train  # torch and vLLM come with it

        train(run, inputs, stop_signals)


def default_output_dir(run: Run, arguments: Arguments) -> str:
    """runs/<recipe> and what differs from it: the same command finds its checkpoints again."""
    named = {}
    for item in read(arguments.overrides, arguments.source)[0]:
        if item.key in NOT_IN_DIRECTORY_NAME or item.is_hydra:
            continue
        value = item.text if item.is_choice or item.is_free else attrgetter(item.key)(run)
        named[item.key] = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    text = "-".join([run.recipe or "run", *(f"{key}={named[key]}" for key in sorted(named))])
    name = re.sub(r"[^A-Za-z0-9._=,+-]", "_", text)
    if len(name) > DIRECTORY_NAME_LENGTH:
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        name = f"{name[: DIRECTORY_NAME_LENGTH - 1 - len(digest)]}-{digest}"
    return f"runs/{name}"


def ask_hydra(arguments: Arguments) -> int:
    try:
        return _answer(arguments)
    except BrokenPipeError:  # train.py --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _answer(arguments: Arguments) -> int:
    words = arguments.overrides
    if arguments.about_hydra:
        register()
    else:
        with planned(words, arguments.source) as plan:
            words = plan.words
        if plan.problems:
            raise ConfigError(*unique(plan.problems))
    return WRONG_CONFIG if run_hydra(lambda _config: None, words, arguments) else DONE


def _report(lines: Iterable[str], code: int) -> int:
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        traceback.print_exc()
    for line in lines:
        _tell(f"rlswitch: error: {' '.join(line.split())}")
    return code


def _tell(line: str) -> None:
    with suppress(OSError):  # the terminal has gone: the exit code still says it
        print(line, file=sys.stderr)


if __name__ == "__main__":
    leave(main())
