"""Intercepts the system calls by which a forked child changes files, and interrupts it at any of them.

The kernel notifies us before each call (seccomp's user notifications, Linux 5.5 and later), whether Python,
libc, or Rust code in safetensors and tokenizers makes it. Not covered: writes to mapped memory, and what a
disk does with data between two calls. A killed child leaves its writes in the page cache, so this does not
simulate a power failure; the order of the calls shows which data was synced to disk first.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import select
import signal
import socket
import struct
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

NUMBERS: dict[str, dict[int, tuple[str, str]]] = {
    "x86_64": {
        **{1: ("write", "fd"), 18: ("write", "fd"), 20: ("write", "fd"), 296: ("write", "fd")},
        **{74: ("fsync", "fd"), 75: ("fsync", "fd"), 77: ("truncate", "fd"), 285: ("truncate", "fd")},
        **{2: ("open", "path"), 257: ("open", "at"), 83: ("mkdir", "path"), 258: ("mkdir", "at")},
        **{82: ("rename", "path"), 264: ("rename", "at"), 316: ("rename", "at")},
        **{84: ("remove", "path"), 87: ("remove", "path"), 263: ("remove", "at")},
    },
    "aarch64": {
        **{64: ("write", "fd"), 66: ("write", "fd"), 68: ("write", "fd"), 70: ("write", "fd")},
        **{82: ("fsync", "fd"), 83: ("fsync", "fd"), 46: ("truncate", "fd"), 47: ("truncate", "fd")},
        **{56: ("open", "at"), 34: ("mkdir", "at"), 35: ("remove", "at")},
        **{38: ("rename", "at"), 276: ("rename", "at")},
    },
}
SECCOMP = {"x86_64": 317, "aarch64": 277}
TAKES_ROOM = {"write", "fsync", "truncate", "open", "mkdir"}

PR_SET_NO_NEW_PRIVS, SET_MODE_FILTER, NEW_LISTENER, CONTINUE = 38, 1, 8, 1
ALLOW, ASK = 0x7FFF0000, 0x7FC00000
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
RECEIVE, SEND = 0xC0502100, 0xC0182101
NOTICE = "=QIIiIQ6Q"  # id, pid, flags; number, architecture, instruction pointer, arguments

libc = ctypes.CDLL(None, use_errno=True)


class Call(NamedTuple):
    """A call that changes files: opening a file for reading does not."""

    name: str
    path: Path
    target: Path | None = None
    """The target of a rename."""


class Ended(NamedTuple):
    """A child's calls below the directory, and its exit code, negative for a signal."""

    calls: list[Call]
    code: int


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_ushort),
        ("yes", ctypes.c_ubyte),
        ("no", ctypes.c_ubyte),
        ("k", ctypes.c_uint),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.POINTER(_Instruction)))


def run_watched(
    work: Callable[[], object], root: Path, kill_at: int | None = None, full_from: int | None = None
) -> Ended:
    """Runs `work` in a fork: kills it instead of call number `kill_at` (from 0) below `root`, or fills the
    disk from call number `full_from` on; that call itself always fails.

    Exit codes: 0, or 1 when `work` raised. Raises OSError where the kernel does not let us watch.
    """
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        _be_child(work, theirs)
    theirs.close()
    calls: list[Call] = []
    with ours:
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    if not descriptors:
        os.waitpid(pid, 0)
        raise OSError(errno.EPERM, "seccomp gives no notifications here")
    listener = descriptors[0]
    try:
        while (notice := _next(listener)) is not None:
            call = _call_of(pid, root, notice[3], notice[6:])
            number, answer = len(calls), 0
            if call is not None:
                calls.append(call)
                if number == kill_at:
                    os.kill(pid, signal.SIGKILL)
                    break
                if full_from is not None and number >= full_from:
                    answer = errno.ENOSPC if number == full_from or call.name in TAKES_ROOM else 0
            with suppress(FileNotFoundError):  # it has died in the meantime
                fcntl.ioctl(
                    listener,
                    SEND,
                    bytearray(struct.pack("=QqiI", notice[0], 0, -answer, 0 if answer else CONTINUE)),
                )
        return Ended(calls, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    finally:
        os.close(listener)


def _be_child(work: Callable[[], object], parent: socket.socket) -> NoReturn:
    code = 1
    try:
        listener = _install()
        socket.send_fds(parent, [b"x"], [listener])
        os.close(listener)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _install() -> int:
    machine = platform.machine()
    numbers = list(NUMBERS[machine])
    program = [_Instruction(LOAD, 0, 0, 0)]
    program += [_Instruction(JUMP_IF_EQUAL, len(numbers) - i, 0, n) for i, n in enumerate(numbers)]
    program += [_Instruction(RETURN, 0, 0, ALLOW), _Instruction(RETURN, 0, 0, ASK)]
    whole = _Program(len(program), (_Instruction * len(program))(*program))
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    listener = libc.syscall(SECCOMP[machine], SET_MODE_FILTER, NEW_LISTENER, ctypes.byref(whole))
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return listener


def _next(listener: int) -> tuple[int, ...] | None:
    """The next call that the child waits to make, or None once it has exited."""
    while True:
        poller = select.poll()
        poller.register(listener, select.POLLIN)
        if not any(event & select.POLLIN for _, event in poller.poll()):
            return None
        buffer = bytearray(struct.calcsize(NOTICE))
        with suppress(FileNotFoundError):
            fcntl.ioctl(listener, RECEIVE, buffer)
            return struct.unpack(NOTICE, buffer)


def _call_of(pid: int, root: Path, number: int, arguments: tuple[int, ...]) -> Call | None:
    name, how = NUMBERS[platform.machine()][number]
    if name == "open":
        flags = arguments[1 if how == "path" else 2]
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return None
    if how == "fd":
        paths = [_target(pid, arguments[0])]
    elif how == "path":
        paths = [_target(pid) / _text(pid, address) for address in arguments[: 1 + (name == "rename")]]
    else:
        pairs = [arguments[:2], arguments[2:4]][: 1 + (name == "rename")]
        paths = [_target(pid, directory) / _text(pid, address) for directory, address in pairs]
    return Call(name, *paths) if paths[0].is_relative_to(root) else None


def _target(pid: int, descriptor: int | None = None) -> Path:
    """The file of a descriptor; without one, or for AT_FDCWD, the working directory."""
    if descriptor is None or descriptor & 0x80000000:
        return Path(os.readlink(f"/proc/{pid}/cwd"))
    return Path(os.readlink(f"/proc/{pid}/fd/{descriptor & 0xFFFFFFFF}"))


def _text(pid: int, address: int) -> str:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        text = b""
        while b"\0" not in text:  # up to the end of the page: the next one may be unmapped
            text += memory.read(4096 - (address + len(text)) % 4096)
    return os.fsdecode(text.partition(b"\0")[0])
