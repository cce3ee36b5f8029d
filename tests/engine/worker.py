"""A worker that can be told to make the mistakes that a proof has to catch."""

from rlswitch.engines.cpu_worker import SleepingCPUWorker


class SaboteurWorker(SleepingCPUWorker):
    """Behaves like its base until `sabotage` is called, by name, through collective_rpc."""

    keep_stale_head = False

    def sabotage(self, keep_stale_head: bool) -> None:
        self.keep_stale_head = keep_stale_head

    def _drop_weights(self) -> None:
        kept = [(layer, layer.cpu_linear) for layer in self._packed_linears() if layer.weight.numel()]
        super()._drop_weights()
        if self.keep_stale_head:
            for layer, packed in kept:
                layer.cpu_linear = packed

    def _repack_shared_weights(self) -> None:
        if not self.keep_stale_head:
            super()._repack_shared_weights()
