"""The memory behind the KV cache of vLLM's model runners."""

from collections.abc import Iterable, Sequence

from torch import Tensor, UntypedStorage


def kv_storages(kv_caches: Iterable[Tensor | Sequence[Tensor]]) -> list[UntypedStorage]:
    """The storages of `kv_caches`, one entry per layer; each once, as layers may share one.

    In vLLM 0.26 the entry of a Mamba or DeltaNet layer is a list of tensors.
    """
    tensors = (it for entry in kv_caches for it in ([entry] if isinstance(entry, Tensor) else entry))
    storages = (tensor.untyped_storage() for tensor in tensors)
    return list({storage.data_ptr(): storage for storage in storages}.values())
