"""The command line: parse, compose, check, then run, plan, preview or sweep."""
