"""The reference policy of a KL penalty: an earlier policy, refreshed now and then.

Used through `with reference.model() as model`, in which the model computes as the reference.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlswitch.training import lora


class FrozenModel:
    """A second model, in the engine's dtype."""

    def __init__(self, frozen: PreTrainedModel, policy: nn.Module):
        frozen.eval().requires_grad_(False)
        self._frozen, self._policy = frozen, policy
        self._refreshed = False
        self.parts: list[nn.Module] = [frozen]
        """Modules besides the policy that take memory on the device."""

    @contextmanager
    def model(self) -> Iterator[nn.Module]:
        yield self._frozen

    def refresh(self) -> None:
        """Makes the current policy the reference."""
        self.load(self._policy.state_dict())

    def state(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint keeps: none before the first refresh."""
        tied = set(self._frozen.all_tied_weights_keys)
        state = self._frozen.state_dict() if self._refreshed else {}
        return {name: tensor for name, tensor in state.items() if name not in tied}

    def load(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self._frozen.state_dict().items():
                if name in state:  # a tied tensor has only its other name there
                    tensor.copy_(state[name])
        self._refreshed = True


class OtherAdapter:
    """The policy's frozen weights with an earlier adapter, or with none: no second model."""

    def __init__(self, policy: nn.Module):
        self._policy = policy
        self.parts: list[nn.Module] = []
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
