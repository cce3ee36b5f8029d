"""Processes: the fork server, groups that end together, signals and exit codes."""
