"""python scripts/vllm_matrix.py [VERSION|WHEEL ...]: which vLLM versions have what rlswitch calls.

Reads names and signatures from each wheel without importing it, and writes docs/vllm_versions.md. Versions
(VERSIONS by default) are downloaded with pip.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

PAGE = Path(__file__).resolve().parents[1] / "docs" / "vllm_versions.md"
VERSIONS = ("0.26.0", "0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0")
PLATFORMS = ("manylinux_2_31_x86_64", "manylinux_2_28_x86_64", "manylinux2014_x86_64")
PARSED = (
    *("vllm/entrypoints/", "vllm/v1/", "vllm/engine/"),
    *("vllm/sampling_params", "vllm/model_executor/layers/utils"),
)


@dataclass(frozen=True, slots=True)
class Need:
    """One name that rlswitch uses: a class, function, method or field, with the parameters it passes."""

    name: str
    """Class.member, or a function, as it is defined somewhere in the file."""
    file: str
    parameters: tuple[str, ...] = ()
    only_for: str = ""
    """What is not possible without it; empty: a run needs it."""


def need(file: str, only_for: str, *names: str) -> list[Need]:
    """Needs in one file, written as `Class.member(parameter, parameter)`."""
    found = []
    for text in names:
        name, _, inside = text.rstrip(")").partition("(")
        found.append(Need(name, file, tuple(inside.split(", ")) if inside else (), only_for))
    return found


NEEDS = [
    *need(
        "vllm/entrypoints/llm.py",
        "",
        "LLM.sleep(level)",
        "LLM.wake_up(tags)",
        "LLM.collective_rpc(method, kwargs)",
        "LLM.reset_prefix_cache",
        "LLM.enqueue(prompts, sampling_params, use_tqdm)",
    ),
    *need("vllm/entrypoints/llm.py", "switch.level=kv", "LLM.release_kv_cache_memory"),
    *need(
        "vllm/v1/engine/llm_engine.py",
        "",
        "LLMEngine.step",
        "LLMEngine.has_unfinished_requests",
        "LLMEngine.is_sleeping",
    ),
    *need("vllm/v1/engine/core_client.py", "", "MPClient.shutdown(timeout)"),
    *need(
        "vllm/sampling_params.py",
        "",
        *(f"SamplingParams.{field}" for field in ("temperature", "seed", "max_tokens", "logprobs")),
        *(f"SamplingParams.{field}" for field in ("prompt_logprobs", "stop_token_ids", "detokenize")),
    ),
    *need(
        "vllm/engine/arg_utils.py",
        "",
        *(f"EngineArgs.{field}" for field in ("model", "skip_tokenizer_init", "dtype", "max_model_len")),
        *(f"EngineArgs.{field}" for field in ("seed", "trust_remote_code", "tensor_parallel_size")),
        *(f"EngineArgs.{field}" for field in ("logprobs_mode", "enable_prefix_caching", "disable_log_stats")),
        *(f"EngineArgs.{field}" for field in ("enable_sleep_mode", "gpu_memory_utilization", "worker_cls")),
        *(f"EngineArgs.{field}" for field in ("enforce_eager", "enable_chunked_prefill")),
        "EngineArgs.kv_cache_memory_bytes",
    ),
    *need(
        "vllm/v1/worker/gpu_worker.py",
        "",
        "Worker.reload_weights",
        "Worker.wake_up(tags)",
        "Worker.get_model",
    ),
    *need("vllm/v1/worker/gpu/model_runner.py", "", "GPUModelRunner.reload_weights"),
    *need("vllm/v1/worker/gpu_model_runner.py", "", "GPUModelRunner.reload_weights"),
    *need("vllm/v1/worker/cpu_worker.py", "the CPU", "CPUWorker"),
    *need("vllm/model_executor/layers/utils.py", "the CPU", "dispatch_cpu_unquantized_gemm(remove_weight)"),
]
ROUTES = {
    route: only_for
    for only_for, routes in {
        "engine=server": ("/sleep", "/wake_up", "/is_sleeping", "/collective_rpc", "/reset_prefix_cache"),
        "engine=server switch.level=kv": ("/release_kv_cache_memory",),
    }.items()
    for route in routes
}
WORDS = {
    "enable_prompt_tokens_details": "engine=server",
    "return_token_ids": "engine=server",
    "return_tokens_as_token_ids": "engine=server",
    "disable_uvicorn_access_log": "engine=server",
}
"""Flags and request fields of the server: looked for as words in vllm/entrypoints."""


class Wheel:
    """The Python sources of one vLLM wheel."""

    def __init__(self, path: Path):
        self.version = path.name.split("-")[1]
        with ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".py") and name.startswith(PARSED)]
            self.sources = {name: archive.read(name).decode() for name in names}

    def definition(self, need: Need) -> ast.AST | None:
        """Where `need.name` is defined: in its file, or in a base class within the same sources."""
        owner, _, member = need.name.partition(".")
        if need.file not in self.sources:
            return None
        found = self._top_level(need.file, owner)
        if not member or found is None:
            return found
        return self._member(found, member, {owner})

    def _member(self, owner: ast.AST, member: str, seen: set[str]) -> ast.AST | None:
        assert isinstance(owner, ast.ClassDef)
        for node in owner.body:
            names = {getattr(node, "name", None), getattr(getattr(node, "target", None), "id", None)}
            if member in names:
                return node
        for base in owner.bases:
            name = base.id if isinstance(base, ast.Name) else getattr(base, "attr", "")
            if name and name not in seen:
                for file in self.sources:
                    parent = self._top_level(file, name)
                    found = self._member(parent, member, seen | {name}) if parent else None
                    if found:
                        return found
        return None

    def _top_level(self, file: str, name: str) -> ast.ClassDef | ast.FunctionDef | None:
        if f"class {name}" not in self.sources[file] and f"def {name}" not in self.sources[file]:
            return None
        for node in ast.parse(self.sources[file]).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return node
        return None

    def lacks(self) -> Iterator[tuple[str, str]]:
        """(name, what is not possible without it) of everything that is not there as rlswitch calls it."""
        for it in NEEDS:
            node = self.definition(it)
            if node is None:
                yield it.name, it.only_for
            elif missing := [name for name in it.parameters if not _takes(node, name)]:
                yield f"{it.name}({', '.join(missing)})", it.only_for
        server = "\n".join(text for name, text in self.sources.items() if name.startswith("vllm/entrypoints"))
        yield from ((route, why) for route, why in ROUTES.items() if f'"{route}"' not in server)
        yield from ((word, why) for word, why in WORDS.items() if word not in server)


def _takes(node: ast.AST, parameter: str) -> bool:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return node.args.kwarg is not None or parameter in {it.arg for it in every}


def fetched(version: str, folder: Path) -> Path:
    """The CUDA wheel of a version, downloaded with pip."""
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, *platforms, "--dest", str(folder), f"vllm=={version}"], check=True)
    return next(folder.glob(f"vllm-{version}-*.whl"))


def page(wheels: Sequence[Wheel]) -> str:
    rows = [f"| {wheel.version} | {_verdict(list(wheel.lacks()))} |" for wheel in wheels]
    return "\n".join(
        [
            "# vLLM versions",
            "",
            "Written by `python scripts/vllm_matrix.py`: do not edit.",
            "",
            f"rlswitch calls {len(NEEDS)} names of vLLM's Python API, {len(ROUTES)} HTTP routes, and"
            f" {len(WORDS)} flags and request fields of its",
            "server. The script reads each wheel's sources without importing them and looks for every",
            "name and parameter that rlswitch passes. It shows what exists, not what works: tests run the",
            "CPU build of vLLM 0.32; no version has been run on a GPU.",
            "",
            "| vLLM | lacks |",
            "| --- | --- |",
            *rows,
            "",
        ]
    )


def _verdict(lacks: list[tuple[str, str]]) -> str:
    if not lacks:
        return "nothing"
    return "; ".join(f"`{name}`{f' (needed for {why})' if why else ''}" for name, why in lacks)


def main(arguments: Sequence[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        wheels = []
        for word in arguments or VERSIONS:
            path = Path(word) if word.endswith(".whl") else fetched(word, Path(folder))
            wheels.append(Wheel(path))
            print(wheels[-1].version, _verdict(list(wheels[-1].lacks())), flush=True)
    PAGE.write_text(page(wheels))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
