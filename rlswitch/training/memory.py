"""What the trainer does when the device is out of memory: repeat the work in smaller parts."""

from collections.abc import Callable
from typing import TypeVar

import torch

from rlswitch.errors import RLSwitchError
from rlswitch.switch.device import Device
from rlswitch.text import first_line
from rlswitch.types import Batch

T = TypeVar("T")


class MemoryLimit:
    """Tokens in a micro-batch: as configured, and fewer for the rest of the run once memory ran out."""

    def __init__(
        self,
        micro_batch_tokens: int,
        device: Device,
        is_out_of_memory: Callable[[Exception], bool],
        log: Callable[[str], None],
    ):
        self.configured = self.tokens = micro_batch_tokens
        self.device, self.is_out_of_memory, self.log = device, is_out_of_memory, log

    @property
    def reduced(self) -> int | None:
        """The tokens that did fit, which a checkpoint keeps; None while they are as configured."""
        return self.tokens if self.tokens < self.configured else None

    def shrinking(self, step: int, batch: Batch, work: Callable[[], T]) -> T:
        """`work()` on `batch`, repeated with half the tokens as long as it runs out of memory.

        The result is the same up to the order of sums. Raises RLSwitchError when the longest rollout does
        not fit alone.
        """
        while True:
            try:
                return work()
            except RuntimeError as error:
                reason = self._out_of_memory(error)
            # Outside the handler: the exception's frames held the tensors that did not fit.
            self.device.reclaim()
            self._halve(step, batch, reason)

    def apply(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's step, repeated once if its first one has no memory for the states it creates.

        Raises RLSwitchError when there is none then either.
        """
        for tries_left in (1, 0):
            try:
                optimizer.step()
                return
            except RuntimeError as error:
                reason = self._out_of_memory(error)
            states = optimizer.state.values()
            if not tries_left or any(state and float(state["step"]) > 0 for state in states):
                raise RLSwitchError(
                    f"step {step}: the optimizer ran out of memory ({reason}), and smaller micro-batches"
                    " would not help; set trainer.park=everything, or model.lora_rank"
                )
            for state in states:
                state.clear()  # it may be incomplete
            self.device.reclaim()

    def _out_of_memory(self, error: RuntimeError) -> str:
        """The reason in one line; any other error is raised again."""
        if not self.is_out_of_memory(error):
            raise error
        return first_line(error)

    def _halve(self, step: int, batch: Batch, reason: str) -> None:
        longest = int(batch.lengths.max())
        tried = min(self.tokens, batch.attention_mask.numel())
        if tried <= longest:
            raise RLSwitchError(
                f"step {step}: one rollout of {longest} tokens does not fit alone ({reason}); set"
                " trainer.gradient_checkpointing=true, trainer.park=everything, model.lora_rank, or a smaller"
                " rollout.max_new_tokens"
            )
        self.tokens = max(tried // 2, longest)
        self.log(
            f"out of memory in step {step}: micro-batches of {self.tokens} tokens from here on, with the same"
            f" result; to start with them, set trainer.micro_batch_tokens={self.tokens}"
        )
