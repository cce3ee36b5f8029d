"""Exits with 1, and a line each, for packages whose build does not match torch: importing them would fail."""

from __future__ import annotations

import re
import sys
from importlib import metadata

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
"""What transformers and vLLM import if it is installed."""


def build_of(package: metadata.Distribution) -> str:
    """`cpu`, `cu13` (of cu130) or nothing. Wheel metadata may omit it, a package's version.py does not."""
    file = package.locate_file(f"{package.name}/version.py")
    text = file.read_text() if file.is_file() else package.version  # type: ignore[attr-defined]
    found = re.search(r"\+(cpu|cu\d\d)", text)
    return found[1] if found else ""


def problems(path: list[str]) -> list[str]:
    """A line for each companion built for another CUDA than torch, or for CUDA beside a CPU torch."""
    found = {package.name: package for package in metadata.distributions(path=path)}
    if "torch" not in found:
        return []
    torch = build_of(found["torch"])
    return [
        f"{name} is built for {build}, torch for {torch}: importing transformers or vLLM would fail;"
        f" run `pip uninstall {name}`"
        for name in COMPANIONS
        if name in found and (build := build_of(found[name])).startswith("cu") and torch not in ("", build)
    ]


if __name__ == "__main__":
    lines = problems(sys.path)
    for line in lines:
        print(f"rlswitch: error: {line}", file=sys.stderr)
    sys.exit(bool(lines))
