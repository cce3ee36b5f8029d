"""A worker that can be told to make the mistakes that a proof has to catch, and to die or hang."""

import os
import signal
from collections.abc import Callable
from typing import Any

from rlswitch.engines.cpu_worker import SleepingCPUWorker


class SaboteurWorker(SleepingCPUWorker):
    """Behaves like its base until `sabotage` or `doom` is called, by name, through collective_rpc."""

    keep_stale_head = False

    def sabotage(self, keep_stale_head: bool) -> None:
        self.keep_stale_head = keep_stale_head

    def doom(self, call: str, calls: int, number: int) -> None:
        """After `calls` more of `call` the process gets the signal `number` at the end of the next one."""
        whole: Callable = getattr(self, call)

        def doomed(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls -= 1
            answer = whole(*args, **kwargs)
            if calls < 0:
                os.kill(os.getpid(), signal.Signals(number))
            return answer

        setattr(self, call, doomed)

    def _drop_weights(self) -> None:
        kept = [(layer, layer.cpu_linear) for layer in self._packed_linears() if layer.weight.numel()]
        super()._drop_weights()
        if self.keep_stale_head:
            for layer, packed in kept:
                layer.cpu_linear = packed

    def _repack_shared_weights(self) -> None:
        if not self.keep_stale_head:
            super()._repack_shared_weights()
