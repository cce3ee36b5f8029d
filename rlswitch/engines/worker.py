"""The old place of ProvenWorker: servers that are running were started with this name."""

from rlswitch.engines.vllm.worker import ProvenWorker

__all__ = ["ProvenWorker"]
