"""Moves the trainer's tensors to host memory while the engine holds the GPU, and back."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from rlswitch.switch.device import Device

SLACK = 0.03  # share of the GPU for the CUDA context, fragmentation and kernels' workspaces


class Parking:
    """Parks what trainer.park names: nothing, the optimizer's state, or everything.

    `auto` parks only what does not fit beside the engine: copying the rest would cost seconds a step for
    nothing. On a CPU the device is host memory already, so nothing moves.
    """

    def __init__(
        self,
        policy: str,
        device: Device,
        parts: Callable[[], Iterator[nn.Module]],
        optimizer: torch.optim.Optimizer,
    ):
        self.policy, self.device, self.parts, self.optimizer = policy, device, parts, optimizer
        self.engine_bytes = 0
        """What the awake engine needs; set once it is measured."""
        self.pinned: dict[int, Tensor] = {}
        self.parked: list[Tensor] = []

    def park(self) -> int:
        """Moves the chosen tensors to pinned host memory in place; returns the bytes moved."""
        if self.parked:  # the last hand-over failed half-way
            return 0
        self.parked = [t for t in self._chosen() if t.device.type == "cuda"]
        for tensor in self.parked:
            if id(tensor) not in self.pinned:
                self.pinned[id(tensor)] = torch.empty_like(tensor.data, device="cpu", pin_memory=True)
            self.pinned[id(tensor)].copy_(tensor.data, non_blocking=True)
        if self.parked:
            torch.cuda.synchronize()
        for tensor in self.parked:
            tensor.data = self.pinned[id(tensor)]
        return nbytes(self.parked)

    def bring_back(self) -> int:
        """Reverses `park`; returns the bytes moved."""
        moved = nbytes(self.parked)
        for tensor in self.parked:
            tensor.data = tensor.data.to(self.device.torch, non_blocking=True)
        if self.parked:
            torch.cuda.synchronize()
        self.parked = []
        return moved

    def unreleased(self) -> str | None:
        if self.device.kind != "cuda" or self.policy != "everything":
            return None
        held = torch.cuda.memory_allocated()
        if held <= SLACK * self.device.total_bytes():
            return None
        return f"{held / 2**30:.2f} GiB of tensors are still on the GPU after everything was parked"

    def _chosen(self) -> list[Tensor]:
        parameters = [p for part in self.parts() for p in part.parameters()]
        states = [
            value
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor) and value.dim() > 0
        ]
        policy = self.policy
        if policy == "auto":
            sizes = nbytes(parameters), nbytes(states)
            policy = parked_by_auto(*sizes, self.engine_bytes, self.device.total_bytes())
        return {"nothing": [], "optimizer": states, "everything": parameters + states}[policy]


def parked_by_auto(parameters: int, states: int, engine: int, device: int) -> str:
    """What `auto` parks beside an engine on a GPU of `device` bytes: nothing, optimizer or everything."""
    room = (1 - SLACK) * device - engine
    if parameters + states <= room:
        return "nothing"
    return "optimizer" if parameters <= room else "everything"


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
