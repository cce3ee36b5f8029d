"""The old place of SleepingCPUWorker, which running servers were started with."""

from rlswitch.engines.vllm.cpu_worker import SleepingCPUWorker

__all__ = ["SleepingCPUWorker"]
