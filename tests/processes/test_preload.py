"""What the fork server imports: vLLM's CPU worker on a CPU only, since its import patches torch's CUDA."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

LOOK = """
import json, sys
import vllm.platforms
if {gpu}:
    type(vllm.platforms.current_platform).is_cpu = lambda self: False
import rlswitch.processes.preload
import torch
print(json.dumps([torch.cuda.Stream.__name__, sorted(sys.modules)]))
"""
PARENT_SIDE = {"vllm.entrypoints.llm", "vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor"}


@pytest.mark.processes
@pytest.mark.parametrize("gpu", [True, False])
def test_only_on_a_cpu_is_the_cpu_worker_preloaded(gpu: bool) -> None:
    found = subprocess.run([sys.executable, "-c", LOOK.format(gpu=gpu)], capture_output=True, check=True)
    stream, imported = json.loads(found.stdout.splitlines()[-1])
    assert PARENT_SIDE | {"rlswitch.loop", "transformers"} <= set(imported)
    workers = {name for name in imported if name.startswith("vllm.v1.worker.cpu")}
    assert (stream == "Stream") == gpu
    assert bool(workers) != gpu and ("vllm.v1.worker.gpu_model_runner" in imported) != gpu
