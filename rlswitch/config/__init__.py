"""The settings of a run: every one of them, its bounds, and how a bad value is reported."""
