"""The reference policy of a KL penalty: an earlier policy, refreshed now and then."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlswitch.config.sections import ModelConfig
from rlswitch.training import lora
from rlswitch.training.models import load_causal


class Reference(ABC):
    """A frozen earlier version of the policy, used through `with reference.model() as model`."""

    parts: list[nn.Module]
    """Modules besides the policy that take memory on the device."""

    @abstractmethod
    def model(self) -> AbstractContextManager[nn.Module]:
        """A context in which the returned model computes as the reference."""

    @abstractmethod
    def refresh(self) -> None:
        """Makes the current policy the reference."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The tensors a checkpoint keeps: none before the first refresh."""

    @abstractmethod
    def load(self, state: dict[str, Tensor]) -> None:
        """Restores `state()`."""


def load_reference(
    config: ModelConfig, path: str, dtype: torch.dtype, device: torch.device, policy: nn.Module
) -> Reference:
    """The initial policy: with LoRA the policy without its adapters, otherwise a model loaded from `path`."""
    if config.lora_rank:
        return OtherAdapter(policy)
    frozen = load_causal(config, path, dtype)
    frozen.to(device)
    return FrozenModel(frozen, policy)


class FrozenModel(Reference):
    """A second model, in the engine's dtype."""

    def __init__(self, frozen: PreTrainedModel, policy: nn.Module):
        frozen.eval().requires_grad_(False)
        self._frozen, self._policy = frozen, policy
        self._refreshed, self.parts = False, [frozen]

    @contextmanager
    def model(self) -> Iterator[nn.Module]:
        yield self._frozen

    def refresh(self) -> None:
        self.load(self._policy.state_dict())

    def state(self) -> dict[str, Tensor]:
        tied = set(self._frozen.all_tied_weights_keys)
        state = self._frozen.state_dict() if self._refreshed else {}
        return {name: tensor for name, tensor in state.items() if name not in tied}

    def load(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self._frozen.state_dict().items():
                if name in state:  # a tied tensor has only its other name there
                    tensor.copy_(state[name])
        self._refreshed = True


class OtherAdapter(Reference):
    """The policy's frozen weights with an earlier adapter, or with none: no second model."""

    def __init__(self, policy: nn.Module):
        self._policy, self.parts = policy, []
        self._adapter: dict[str, Tensor] | None = None

    @contextmanager
    def model(self) -> Iterator[nn.Module]:
        with lora.adapter_replaced(self._policy, self._adapter):
            yield self._policy

    def refresh(self) -> None:
        self._adapter = lora.adapter_copy(self._policy)

    def state(self) -> dict[str, Tensor]:
        return self._adapter or {}

    def load(self, state: dict[str, Tensor]) -> None:
        self._adapter = dict(state)
