"""Who holds the accelerator: the switch, the ledger that times every hand-over, and the device."""
