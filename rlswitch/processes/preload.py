"""Imported by the fork server, and by nothing else: importing it is what makes the server warm."""

import atexit
import gc
import importlib
import os
import shutil
from contextlib import suppress

from rlswitch.processes.fork_server import DIRECTORY, leave_group

MODULES = (
    "vllm.entrypoints.llm",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.model_executor.models.qwen3",
    "rlswitch.engines.vllm.cpu_worker",
    "rlswitch.recipes.addition.policy",
    "rlswitch.loop",
)
"""Without one of them a child imports it itself."""


def remove(directory: str, owner: int) -> None:
    if os.getpid() == owner:  # and none of those that were forked from it
        shutil.rmtree(directory, ignore_errors=True)


leave_group()
if DIRECTORY in os.environ:
    atexit.register(remove, os.environ[DIRECTORY], os.getpid())
for name in MODULES:
    with suppress(Exception):  # a device that it is not for, a vLLM that has it elsewhere
        importlib.import_module(name)
gc.collect()
gc.freeze()  # a collection in a child would touch, and so copy, every page of these million objects
