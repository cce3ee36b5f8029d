"""Incompatible packages: what set-up finds in their metadata, and errors at import."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from rlswitch.command import cli
from rlswitch.errors import EngineError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "check_environment.py"
NMS = "operator torchvision::nms does not exist"

problems: Callable[[list[str]], list[str]] = runpy.run_path(str(SCRIPT))["problems"]


def install(site: Path, name: str, version: str, build: str = "") -> None:
    """A package's metadata and, with `build`, a version.py like torch's."""
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if build:
        (site / name).mkdir()
        (site / name / "version.py").write_text(f"__version__ = '{build}'\nraise ImportError\n")


@pytest.mark.parametrize(
    ("torch", "companion", "fits"),
    [
        ("2.13.0+cpu", "0.28.0+cu130", False),
        ("2.13.0+cpu", "0.28.0+cpu", True),
        ("2.13.0+cpu", "0.28.0", True),
        ("2.13.0+cu130", "0.28.0+cu130", True),
        ("2.13.0+cu130", "0.28.0+cu131", True),
        ("2.13.0+cu130", "0.28.0+cu126", False),
        ("2.13.0+cu130", "0.28.0+cpu", True),  # a CPU build works with any torch
        ("2.13.0", "0.28.0+cu130", True),  # an unknown build
    ],
)
@pytest.mark.parametrize("metadata_has_build", [True, False])
def test_a_companion_is_built_for_the_same_cuda(torch, companion, fits, metadata_has_build, tmp_path):
    for name, version in (("torch", torch), ("torchvision", companion)):
        bare = version.partition("+")[0]
        install(tmp_path, name, *([version] if metadata_has_build else [bare, version]))
    found = problems([str(tmp_path)])
    assert bool(found) is not fits
    assert all("torchvision is built for" in line and "pip uninstall torchvision" in line for line in found)


def test_each_companion_has_its_line(tmp_path):
    install(tmp_path, "torch", "2.13.0+cpu")
    for name in ("torchvision", "torchaudio", "torchcodec", "numpy"):
        install(tmp_path, name, "1.0+cu130")
    assert [line.split()[0] for line in problems([str(tmp_path)])] == [
        "torchvision",
        "torchaudio",
        "torchcodec",
    ]


def test_this_environment_is_sound():
    done = subprocess.run([sys.executable, "-P", SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.processes
def test_a_torch_that_cannot_be_imported_is_one_line(tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "torch.py").write_text(f"raise RuntimeError('{NMS}')\n")
    paths = [str(tmp_path / "bare"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "recipe=ppo", "engine.fork_server=false", "logger=[]"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith(f"rlswitch: error: RuntimeError: {NMS}: torch, transformers and")


@pytest.fixture
def broken(tmp_path, monkeypatch) -> str:
    """A module that raises on import."""
    (tmp_path / "broken_companion.py").write_text(f"raise RuntimeError('{NMS}')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "broken_companion"


def test_a_failed_import_that_a_library_wraps_is_told_by_its_cause(broken, capsys):
    def start() -> int:
        try:
            import_module(broken)
        except RuntimeError as error:
            raise EngineError("vLLM did not start") from error
        return 0

    assert cli.guarded(start) == 2
    assert capsys.readouterr().err.startswith(
        f"rlswitch: error: RuntimeError: {NMS}: torch, transformers and"
    )


def test_other_errors_are_no_fault_of_the_environment(capsys):
    def start() -> int:
        raise EngineError("vLLM did not start")

    assert cli.guarded(start) == 1
    assert capsys.readouterr().err == "rlswitch: error: vLLM did not start\n"
