"""Who holds the accelerator. A tenant has the whole device or none of it."""

from __future__ import annotations

from typing import Protocol

from rlswitch.errors import SwitchError
from rlswitch.switch.ledger import Ledger
from rlswitch.types import PolicyWeights


class Tenant(Protocol):
    """Anything that needs the whole device: a rollout engine, the trainer, a judge, a reward model."""

    name: str

    def acquire(self, weights: PolicyWeights | None) -> None:
        """Takes the device; an engine serves `weights`."""

    def release(self) -> None:
        """Gives the device back; does nothing if the tenant does not hold it."""

    def unreleased(self) -> str | None:
        """What the tenant still holds after `release`, or None."""


class Switch:
    """Hands the device over: `switch.give_to(engine, weights)`, `switch.give_to(trainer)`."""

    def __init__(self, ledger: Ledger, holder: Tenant | None = None):
        self.ledger = ledger
        self.holder = holder

    def give_to(self, tenant: Tenant, weights: PolicyWeights | None = None) -> None:
        """The holder releases the device, the switch checks its memory, `tenant` acquires the device.

        Raises SwitchError if the holder keeps memory, which the next tenant would run out of mid-work.
        """
        source = self.holder.name if self.holder else ""
        with self.ledger.between(source, tenant.name):
            if self.holder is not tenant:
                self._empty(tenant.name)
            self.holder = tenant
            tenant.acquire(weights)

    def vacate(self) -> None:
        """Leaves the device without a holder, so that the next tenant can be built."""
        with self.ledger.between(self.holder.name if self.holder else "", ""):
            self._empty("the next tenant")

    def _empty(self, successor: str) -> None:
        holder = self.holder
        if holder is None:
            return
        holder.release()
        held = holder.unreleased()
        if held:  # it stays the holder, so a retry cannot skip it
            raise SwitchError(
                f"{holder.name} did not give the device back: {held}; {successor} was not started."
                f" Holders now: {self.ledger.device.describe_holders()}"
            )
        self.holder = None
