"""python scripts/probe.py model=PATH [key=value ...]: test which sleep levels and transports work here.

For each one: does it free the memory, keep the outputs, and stay flat over several cycles? Prints a verdict
per row and writes runs/probe.json, which switch.level=auto reads. All settings: benchmarks/settings.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rlswitch.benchmarks.program import run
from rlswitch.benchmarks.settings import ProbeSettings

if __name__ == "__main__":  # vLLM starts its processes by importing this file again
    run(__doc__, ProbeSettings, "probe", "probe")
