"""Who holds the accelerator. A tenant has the whole device or none of it."""

from __future__ import annotations

from typing import Protocol

from rlswitch.errors import SwitchError
from rlswitch.switch.ledger import Ledger
from rlswitch.types import PolicyWeights


class Tenant(Protocol):
    """A rollout engine, the trainer, a judge, a reward model: anything that needs the device for itself."""

    name: str

    def acquire(self, weights: PolicyWeights | None) -> None:
        """Takes the device; `weights` are for an engine that has to serve them."""

    def release(self) -> None:
        """Gives the device back; may be called when it is not held."""

    def unreleased(self) -> str | None:
        """What is still held although `release` returned, or None when all has come back."""


class Switch:
    """Hands the device over: `switch.give_to(engine, weights)`, `switch.give_to(trainer)`."""

    def __init__(self, ledger: Ledger, holder: Tenant | None = None):
        self.ledger = ledger
        self.holder = holder

    def give_to(self, tenant: Tenant, weights: PolicyWeights | None = None) -> None:
        """The holder lets go, the memory is seen to come back, `tenant` takes over.

        Raises SwitchError when the holder still has what it should have given back: the next tenant
        would run out of memory in the middle of its work.
        """
        source = self.holder.name if self.holder else ""
        with self.ledger.between(source, tenant.name):
            if self.holder is not tenant:
                self._empty(tenant.name)
            self.holder = tenant
            tenant.acquire(weights)

    def vacate(self) -> None:
        """Nobody holds the device: the state in which the next tenant is built."""
        with self.ledger.between(self.holder.name if self.holder else "", ""):
            self._empty("the next tenant")

    def _empty(self, successor: str) -> None:
        holder = self.holder
        if holder is None:
            return
        holder.release()
        held = holder.unreleased()
        if held:  # it stays the holder: a second try must not pass it by
            raise SwitchError(
                f"{holder.name} did not give the device back: {held}; {successor} was not started."
                f" Holders now: {self.ledger.device.describe_holders()}"
            )
        self.holder = None
