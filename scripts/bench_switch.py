"""python scripts/bench_switch.py [key=value ...]: measure what switching between two models costs.

Two models take turns: restarted each time, then asleep at each level, in process and over HTTP.
model_a= and model_b= take directories or hub ids; the defaults are two small models with random weights.
All settings: benchmarks/settings.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rlswitch.benchmarks.program import run
from rlswitch.benchmarks.settings import BenchSettings

if __name__ == "__main__":  # vLLM starts its processes by importing this file again
    run(__doc__, BenchSettings, "switch", "bench_switch", BenchSettings.problems)
