"""python scripts/bench_switch.py [key=value ...]: what switching costs here, in every mode.

Two models take turns: with a restart each time, and asleep at each level, in process and over HTTP.
`model_a=` and `model_b=` take directories or hub ids; without them two small ones are made on the spot.
Every setting stands in rlswitch/bench/settings.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rlswitch.bench.program import run
from rlswitch.bench.settings import BenchSettings

if __name__ == "__main__":  # vLLM starts its processes by importing this file again
    run(__doc__, BenchSettings, "command", "bench_switch", BenchSettings.problems)
