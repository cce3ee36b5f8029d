"""A signal ends the run after its step, with one save; a second Ctrl-C ends it at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from rlswitch.build import open_session
from rlswitch.errors import Preempted, ProofError
from rlswitch.processes.exit import POLITE
from rlswitch.processes.signals import (
    Abandoned,
    StopSignals,
    handling,
    leave_at_second_interrupt,
    preemptible,
    reraise_interrupts,
)

INTERRUPTED = """
import os, signal, sys, time
from contextlib import ExitStack
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever we were started to ignore
from rlswitch.processes.signals import leave_at_second_interrupt
with ExitStack() as stack:
    leave_at_second_interrupt(stack)
    stack.callback(print, "closed", flush=True)
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    if "twice" in sys.argv:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
"""


@pytest.fixture(autouse=True)
def nothing_ignored() -> Iterator[None]:
    """As if the tests had not been started by nohup or in the background."""
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGHUP, hang_up)
    signal.signal(signal.SIGINT, interrupt)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_a_polite_signal_is_noted_and_nothing_else(name: str):
    number = signal.Signals[name]
    before = signal.getsignal(number)
    received = StopSignals()
    with handling(POLITE, received.receive):
        assert not received
        os.kill(os.getpid(), number)
        assert received and received.names == [name]
    assert signal.getsignal(number) == before


def test_a_run_under_nohup_does_not_hear_the_end_of_its_terminal():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    received = StopSignals()
    with handling(POLITE, received.receive):
        os.kill(os.getpid(), signal.SIGHUP)
        assert not received


def test_what_may_be_abandoned_is_left_at_once_and_what_may_not_goes_on():
    done: list[str] = []
    received = StopSignals()
    with handling(POLITE, received.receive):
        with pytest.raises(Abandoned), received.abandoning():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            except Exception:  # a library's
                done.append("taken for its own")
        os.kill(os.getpid(), signal.SIGUSR1)
        done.append("went on")
        with pytest.raises(Abandoned), received.abandoning():
            done.append("begun although it was to stop")
    assert done == ["went on"] and received.names == ["SIGTERM", "SIGUSR1"]


def test_the_first_interrupt_takes_down_in_order_and_the_second_leaves_at_once():
    for words, printed, code in (
        ([], "interrupted\nclosed\n", 0),
        (["twice"], "interrupted\n", 130),
    ):
        words = [sys.executable, "-c", INTERRUPTED, *words]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        assert (done.stdout, done.returncode) == (printed, code), done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("then", [RuntimeError, None], ids=["an error of its own", "nothing"])
def test_a_library_that_swallows_an_interrupt_does_not_keep_it(number: int, then: type[Exception] | None):
    def library() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        except BaseException:
            if then:
                raise then("generator didn't yield") from None

    received = StopSignals()
    with ExitStack() as stack, handling(POLITE, received.receive):
        leave_at_second_interrupt(stack)
        with pytest.raises((KeyboardInterrupt, Abandoned)), received.abandoning(), reraise_interrupts():
            library()
        with pytest.raises(RuntimeError, match="its own"), reraise_interrupts():
            raise RuntimeError("its own")


def test_a_command_that_nobody_listens_in_is_stopped_in_order():
    closed: list[str] = []
    with (
        pytest.raises(Preempted, match="stopped by SIGUSR1 before the first step; run the same"),
        preemptible(),
    ):
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(60)
        finally:
            closed.append("all")
    assert closed == ["all"]


LEAVING = """
import atexit, os, signal, sys, time
from rlswitch.processes.exit import leave
def close():
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    time.sleep(0.5)
    print("closed", flush=True)
atexit.register(close)
leave(75)
"""


@pytest.mark.parametrize(("name", "printed", "code"), [("SIGTERM", "closed\n", 75), ("SIGINT", "", 130)])
def test_who_is_leaving_is_not_stopped_any_more_but_may_be_hurried(name: str, printed: str, code: int):
    words = [sys.executable, "-c", LEAVING, name]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.returncode, done.stderr) == (printed, code, "")


# -- a whole run ---------------------------------------------------------------------------------


def test_a_stop_signal_while_a_run_is_built_takes_down_what_there_is(monkeypatch, make_run):
    closed: list[str] = []

    def build(run, inputs, stop_signals, stack):
        stack.callback(closed.append, "engine")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr("rlswitch.build.build", build)
    with (
        pytest.raises(Preempted, match=r"stopped by SIGTERM before the first step; .* again to resume"),
        preemptible() as stop_signals,
        open_session(make_run(), None, stop_signals),
    ):
        pytest.fail("it was not built")
    assert closed == ["engine"]


def test_further_stop_signals_do_not_disturb_the_end_of_a_run(monkeypatch, make_run):
    """A scheduler sends SIGTERM after SIGUSR1: the exit code stays, and everything is closed."""
    closed: list[str] = []

    def close(what: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        closed.append(what)

    monkeypatch.setattr("rlswitch.build.build", lambda *given: given[-1].callback(close, "engine"))
    for error in (Preempted("saved"), ProofError("not proven")):
        with pytest.raises(type(error)) as caught, preemptible() as stop_signals, ExitStack() as stack:
            stack.callback(close, "rewards")
            with open_session(make_run(), None, stop_signals):
                raise error
        assert caught.value is error
    assert closed == ["engine", "rewards"] * 2
