"""python scripts/soak.py [key=value ...]: check that a run with faults ends like one without.

Trains twice with the same settings, once undisturbed and once with faults injected at random: it kills and
stops engines, kills reward workers, and kills and stops the run itself. Compares every record and the final
weights byte for byte, and checks for leaks. It measures all of /dev/shm, so nothing else should use it
meanwhile. All settings: benchmarks/settings.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rlswitch.benchmarks.program import run
from rlswitch.benchmarks.settings import SoakSettings

if __name__ == "__main__":  # vLLM starts its processes by importing this file again
    run(__doc__, SoakSettings, "soak", "soak")
