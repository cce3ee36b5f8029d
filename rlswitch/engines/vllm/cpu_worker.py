"""A vLLM CPU worker that really sleeps.

On a CPU stock vLLM ignores sleep with a warning, but its engine core and executor run their whole state
machine. A worker that frees memory makes the loop testable without a GPU: level 1 frees the KV cache (the
weights are in host memory already), level 2 the weights as well.
"""

from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.v1.worker.cpu_worker import CPUWorker

from rlswitch.engines.vllm.kv_cache import kv_storages
from rlswitch.engines.vllm.worker import ProvenWorker
from rlswitch.switch.device import trim_heap

EMPTY = torch.empty(0)


class SleepingCPUWorker(ProvenWorker, CPUWorker):
    """A ProvenWorker on a CPU with sleep, wake_up and discard that move memory."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.kv_sizes: list[tuple[torch.UntypedStorage, int]] = []
        self.parameter_forms: dict[str, tuple[torch.Size, tuple[int, ...], torch.dtype]] = {}

    def sleep(self, level: int = 1) -> None:
        self.discard(("kv_cache", "weights") if level == 2 else ("kv_cache",))

    def discard(self, tags: tuple[str, ...]) -> None:
        if "kv_cache" in tags:
            for storage in kv_storages(self.model_runner.kv_caches):
                if size := storage.nbytes():  # 0: asleep already
                    self.kv_sizes.append((storage, size))
                    storage.resize_(0)  # the layers keep their views, which wake_up fills again
        if "weights" in tags:
            self._drop_weights()
        trim_heap()

    def wake_up(self, tags: list[str] | None = None) -> None:
        if tags is None or "weights" in tags:
            self._restore_weights()
        if tags is None or "kv_cache" in tags:
            for storage, size in self.kv_sizes:
                storage.resize_(size)
                # Touches every page, so that the memory is held as on a GPU.
                torch.tensor([], dtype=torch.uint8).set_(storage).zero_()
            self.kv_sizes.clear()

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        super().reload_weights(*args, **kwargs)
        self._repack_shared_weights()

    def fingerprint(self) -> dict[str, Any]:
        if any(layer.weight.numel() == 0 for layer in self._packed_linears()):
            return {"received": self.received, "live": None}
        return super().fingerprint()

    def _drop_weights(self) -> None:
        for name, parameter in self.get_model().named_parameters():
            if parameter.numel():
                self.parameter_forms[name] = (parameter.shape, parameter.stride(), parameter.dtype)
                parameter.data = EMPTY.to(parameter.dtype)
        for layer in self._packed_linears():
            layer.cpu_linear = _asleep  # the closure held the packed copy of the weight

    def _restore_weights(self) -> None:
        parameters = dict(self.get_model().named_parameters())
        for name, (shape, stride, dtype) in self.parameter_forms.items():
            data = torch.empty_strided(shape, stride, dtype=dtype)
            # Level 2 discards. NaN exposes a tensor that the next push misses.
            parameters[name].data = data.fill_(float("nan")) if data.is_floating_point() else data
        self.parameter_forms.clear()

    def _packed_linears(self) -> Iterator[Any]:
        for layer in self.get_model().modules():
            if "cpu_linear" in vars(layer):
                yield layer

    def _repack_shared_weights(self) -> None:
        """vLLM 0.32 leaves a tied lm_head on its old packed copy, for which a reload has no tensor.

        Every rollout after the first push would use a stale head. Remove this when vLLM's own reload
        rebuilds it (tests/engines/test_sabotage.py fails then).
        """
        for layer in self._packed_linears():
            if layer.weight.numel():
                dispatch_cpu_unquantized_gemm(layer, remove_weight=False)


def _asleep(x: Tensor, weight: Tensor, bias: Tensor | None) -> NoReturn:
    raise RuntimeError("forward pass on an engine whose weights are asleep")
