"""What fits on the device: bytes by owner and phase, and the seconds each choice costs."""
