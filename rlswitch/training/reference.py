"""The reference policy of a KL penalty: what the policy was, now and then brought up to date."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlswitch.training import lora


class Reference(ABC):
    """A frozen earlier version of the policy, used through `with reference.model() as model`."""

    @abstractmethod
    def model(self) -> AbstractContextManager[nn.Module]:
        """A context in which the returned model computes as the reference."""

    @abstractmethod
    def refresh(self) -> None:
        """From now on the reference is the policy as it is now."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to keep: nothing before the first refresh."""

    @abstractmethod
    def load(self, state: dict[str, Tensor]) -> None:
        """Puts a kept state back."""

    @property
    @abstractmethod
    def parts(self) -> list[nn.Module]:
        """Modules of its own that take memory on the device."""


class FrozenModel(Reference):
    """A model of its own, in the engine's dtype."""

    def __init__(self, frozen: PreTrainedModel, policy: nn.Module):
        frozen.eval().requires_grad_(False)
        self._frozen, self._policy = frozen, policy
        self._refreshed = False

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
                if name in state:  # a tied tensor is there under its other name
                    tensor.copy_(state[name])
        self._refreshed = True

    @property
    def parts(self) -> list[nn.Module]:
        return [self._frozen]


class OtherAdapter(Reference):
    """The policy's own frozen weights under an earlier adapter, or under none: no second model."""

    def __init__(self, policy: nn.Module):
        self._policy = policy
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

    @property
    def parts(self) -> list[nn.Module]:
        return []
