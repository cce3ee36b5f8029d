"""The old place of ProvenWorker, which running servers were started with."""

from rlswitch.engines.vllm.worker import ProvenWorker

__all__ = ["ProvenWorker"]
