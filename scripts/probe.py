"""python scripts/probe.py model=PATH [key=value ...]: which sleep levels and transports work here?

For each one: does it give back the memory, keep the outputs, stay flat over cycles? A verdict per row,
and runs/probe.json. Every setting stands in benchmarks/settings.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rlswitch.benchmarks.program import run
from rlswitch.benchmarks.settings import ProbeSettings

if __name__ == "__main__":  # vLLM starts its processes by importing this file again
    run(__doc__, ProbeSettings, "probe", "probe")
