"""Isolation for programs that a model wrote."""
