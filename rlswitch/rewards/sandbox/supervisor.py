"""Runs one program under limits and ends every process that it started. Standard library only.

    python -I -S supervisor.py STATUS_FD        with one line of JSON on standard input: a Spec

Any further byte on standard input, or its end, ends the program, so it dies with its parent even by kill -9.
When the supervisor exits, no process is left, despite new sessions and double forks, and no file.

STATUS_FD gets one JSON object: {"exit": 3, "cpu": 0.1}, {"signal": 9, "cpu": 10.0} with the CPU seconds that
RLIMIT_CPU counted, or {"refused": why} when the kernel did not allow such a start; nothing when the program
was ended from outside.
"""

import ctypes
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TypedDict

NOBODY = 65534
FIRST_USER = 2_000_000_000
SYS_MOUNT_SETATTR = 442
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID = 0x20000, 0x10000000, 0x20000000
CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWNET = 0x4000000, 0x8000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 1, 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
CPUCLOCK_PROF = 0
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38

POLITE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Signals that a scheduler or a terminal sends to every process of a job: only the trainer reacts."""

libc = ctypes.CDLL(None, use_errno=True)


class Spec(TypedDict):
    argv: list[str]
    env: dict[str, str]
    limits: dict[str, int]
    """Soft and hard limit by name: RLIMIT_CPU, RLIMIT_AS, ..."""
    isolate: bool
    """In new namespaces: no network, no other process, no file but `visible`, and as another user."""
    visible: list[str]
    """Paths that an isolated program sees, read-only."""
    files: dict[str, str]
    """Written into the program's working directory before it starts; `stdin` is its input."""
    keep: list[int]
    """Descriptors that the program inherits beside the first three."""


def main() -> None:
    status = int(sys.argv[1])
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(0, 1 << 16)
        if not piece:
            return
        line += piece
    spec: Spec = json.loads(line)
    os.set_inheritable(status, False)
    for number in POLITE:
        signal.signal(number, lambda *_: None)
    _call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans come to us, not to init
    directory = Path(tempfile.mkdtemp(prefix="rlswitch-"))
    try:
        if spec["isolate"]:
            _enter_namespaces()
        user = FIRST_USER + os.getpid()
        child = os.fork()
        if child == 0:
            _be_child(spec, directory, status, user)
        if _ends_before_asked(child) and not spec["isolate"]:
            _report(status, _ended(child))
    except OSError as error:
        _report(status, {"refused": str(error)})
    finally:
        end_descendants()
        shutil.rmtree(directory, ignore_errors=True)


def end_descendants() -> None:
    """Kills and reaps until no child is left; children of the killed become ours."""
    while True:
        for pid in _descendants(os.getpid()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _ends_before_asked(child: int) -> bool:
    poller = select.poll()
    pidfd = os.pidfd_open(child)
    poller.register(pidfd, select.POLLIN)
    poller.register(0, select.POLLIN)
    return any(fd == pidfd for fd, _ in poller.poll())


def _descendants(root: int) -> list[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):  # not a process, or gone meanwhile
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


def _be_child(spec: Spec, directory: Path, status: int, user: int) -> NoReturn:
    """Becomes the program, or the first process of its namespaces, with which the kernel ends all others."""
    try:
        _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.umask(0o022)  # the program runs as another user and must read its files
        if spec["isolate"]:
            _build_root(directory, spec["visible"])
            directory = Path("/tmp")
        for name, text in spec["files"].items():
            (directory / name).write_text(text)
        if not spec["isolate"]:
            _become_program(spec, directory, status)
        if os.getuid() == 0:  # root has no limit on processes
            _become(user)
            _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # cleared by the change of user
        program = os.fork()
        if program == 0:
            _become_program(spec, directory, status)
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)) and ended.si_pid != program:
            os.waitpid(ended.si_pid, 0)
        _report(status, _ended(program))
    except BaseException as error:
        _report(status, {"refused": f"{type(error).__name__}: {error}"})
    os._exit(0)


def _become(user: int) -> None:
    """Changes to a user that no other program has, since Linux limits processes per user."""
    os.setgroups([])
    try:
        os.setresgid(user, user, user)
    except OSError:  # a container without that many users
        user = NOBODY
        os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def _become_program(spec: Spec, directory: Path, status: int) -> NoReturn:
    try:
        os.setsid()
        if spec["files"]:
            os.chdir(directory)
        os.dup2(os.open("stdin" if "stdin" in spec["files"] else os.devnull, os.O_RDONLY), 0)
        if "stdin" in spec["files"]:
            os.unlink("stdin")  # later the program cannot read it again
        kept = sorted({2, status, *spec["keep"]})
        for low, high in zip(kept, [*kept[1:], 1 << 20], strict=True):
            os.closerange(low + 1, high)
        for name, value in spec["limits"].items():
            kind = getattr(resource, name)
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
        if spec["isolate"]:
            _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        else:
            for number in POLITE:  # unlike a handler, this survives exec
                signal.signal(number, signal.SIG_IGN)
        os.execve(spec["argv"][0], spec["argv"], spec["env"] | {"TMPDIR": str(directory)})
    except BaseException as error:
        _report(status, {"refused": f"{type(error).__name__}: {error}"})
    os._exit(1)


def _enter_namespaces() -> None:
    """For this process's future children. Without root it takes a user namespace."""
    flags = CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    uid, gid = os.getuid(), os.getgid()
    if uid == 0:
        _call("unshare", flags)
        return
    _call("unshare", flags | CLONE_NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")


def _build_root(root: Path, visible: list[str]) -> None:
    """Enters a root file system in memory: `visible`, read-only, and an empty /tmp."""
    _call("unshare", CLONE_NEWNS)
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", str(root), "tmpfs", MS_NOSUID, "size=1m,mode=755")
    for name in ("tmp", "proc"):
        (root / name).mkdir()
    # Before `visible`: an interpreter may live below /tmp.
    _mount("tmpfs", str(root / "tmp"), "tmpfs", MS_NOSUID | MS_NODEV, "size=64m,mode=777")
    for path in map(Path, visible):
        target = root / path.relative_to("/")
        (target if path.is_dir() else target.parent).mkdir(parents=True, exist_ok=True)
        if not path.is_dir():
            target.touch()
        _mount(str(path), str(target), None, MS_BIND | MS_REC)
    _set_attributes(root, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, AT_RECURSIVE)
    _set_attributes(root / "tmp", 0, MOUNT_ATTR_RDONLY, 0)
    with suppress(OSError):  # a container may forbid it, and Python works without
        _mount("proc", str(root / "proc"), "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.chdir(root)
    _call("pivot_root", b".", b".")
    _call("umount2", b".", MNT_DETACH)
    os.chdir("/")


def _set_attributes(target: Path, on: int, off: int, flags: int) -> None:
    attributes = (ctypes.c_uint64 * 4)(on, off, 0, 0)
    _call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, str(target).encode(), flags, attributes, 32)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    words = [None if word is None else word.encode() for word in (source, target, kind)]
    _call("mount", *words, ctypes.c_ulong(flags), options.encode())


def _call(name: str, *arguments: object) -> None:
    """Calls a function of the C library. Raises OSError when it returns -1."""
    if getattr(libc, name)(*arguments) == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def _ended(pid: int) -> dict[str, float]:
    """How an ended child ended; reaps it.

    RLIMIT_CPU counts whole ticks, of which wait4 reports a tenth less on a busy machine. So this reads the
    kernel's own count, which exists as long as the process does.
    """
    cpu = time.clock_gettime((~pid << 3) | CPUCLOCK_PROF)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {"exit": code, "cpu": cpu} if code >= 0 else {"signal": -code, "cpu": cpu}


def _report(status: int, what: dict[str, float] | dict[str, str]) -> None:
    os.write(status, json.dumps(what).encode() + b"\n")


if __name__ == "__main__":
    main()
