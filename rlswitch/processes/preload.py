"""What the fork server imports at its start; nothing else imports this module."""

import atexit
import gc
import importlib
import os
import shutil
from contextlib import suppress

from rlswitch.processes.fork_server import DIRECTORY, leave_group

SHARED = (
    "torch",
    "transformers",
    "vllm.entrypoints.llm",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "rlswitch.recipes.addition.policy",
    "rlswitch.loop",
)
"""A module that cannot be imported here is imported by the children that need it."""

CPU_ONLY = (
    "vllm.v1.worker.gpu_model_runner",
    "vllm.model_executor.models.qwen3",
    "rlswitch.engines.vllm.cpu_worker",
)
"""On a GPU each child imports its worker and model after the fork: their imports may initialise CUDA, which a
forked process could not use, and vLLM's CPU worker replaces torch.cuda.Stream and others when imported."""


def remove(directory: str, owner: int) -> None:
    if os.getpid() == owner:  # not in the processes forked from it
        shutil.rmtree(directory, ignore_errors=True)


def preload(names: tuple[str, ...]) -> None:
    for name in names:
        with suppress(Exception):  # elsewhere in this version of vLLM
            importlib.import_module(name)


leave_group()
if DIRECTORY in os.environ:
    atexit.register(remove, os.environ[DIRECTORY], os.getpid())
preload(SHARED)
with suppress(Exception):  # as above
    if importlib.import_module("vllm.platforms").current_platform.is_cpu():
        preload(CPU_ONLY)
gc.collect()
gc.freeze()  # a collection in a child would touch, and so copy, every page of a million objects
