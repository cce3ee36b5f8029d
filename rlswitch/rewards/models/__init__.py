"""Rewards that are models and take their turn on the device: judge and reward model."""
