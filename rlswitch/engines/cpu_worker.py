"""The old place of SleepingCPUWorker: servers that are running were started with this name."""

from rlswitch.engines.vllm.cpu_worker import SleepingCPUWorker

__all__ = ["SleepingCPUWorker"]
