"""A vLLM worker that makes the mistakes a proof must catch, dies or hangs on request."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlswitch.engines.vllm.cpu_worker import SleepingCPUWorker
from rlswitch.processes.group import own_family

HUNG = "RLSWITCH_TEST_HUNG"
"""Environment variable: the worker writes its engine's pids to this file and then hangs."""


class SaboteurWorker(SleepingCPUWorker):
    """Behaves like its base class until collective_rpc calls `sabotage` or `doom`."""

    keep_stale_head = False

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        if hung := os.environ.get(HUNG):
            Path(hung).write_text(" ".join(map(str, own_family())))
            time.sleep(1000)
        super().load_model(*args, **kwargs)

    def sabotage(self, keep_stale_head: bool) -> None:
        self.keep_stale_head = keep_stale_head

    def restart(self) -> None:
        """As if another server had replaced it."""
        self.identity["token"] += ", and another"

    def doom(self, call: str, calls: int, number: int) -> None:
        """Sends this process the signal `number` at the end of a `call`, after `calls` more of them."""
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
