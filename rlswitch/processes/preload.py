"""What the fork server imports at its start; nothing else imports this module."""

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
"""A module that cannot be imported here is imported by the children that need it."""


def remove(directory: str, owner: int) -> None:
    if os.getpid() == owner:  # not in the processes forked from it
        shutil.rmtree(directory, ignore_errors=True)


leave_group()
if DIRECTORY in os.environ:
    atexit.register(remove, os.environ[DIRECTORY], os.getpid())
for name in MODULES:
    with suppress(Exception):  # made for another device, or elsewhere in this version of vLLM
        importlib.import_module(name)
gc.collect()
gc.freeze()  # a collection in a child would touch, and so copy, every page of a million objects
