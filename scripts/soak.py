"""python scripts/soak.py [key=value ...]: does a run with faults end like one without?

Trains twice with the same settings, once undisturbed and once with faults injected at random: engines
killed and stopped, reward workers killed, the run itself killed and told to stop. Compares every record
and the final weights byte by byte, and looks for what grows. It counts all of /dev/shm: let nothing else
use that meanwhile. Every setting stands in benchmarks/settings.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rlswitch.benchmarks.program import run
from rlswitch.benchmarks.settings import SoakSettings

if __name__ == "__main__":  # vLLM starts its processes by importing this file again
    run(__doc__, SoakSettings, "soak", "soak")
