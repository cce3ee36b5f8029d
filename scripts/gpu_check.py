"""python scripts/gpu_check.py [--stages a,b] [--limit-s 540] [key=value ...]: check a GPU in ten minutes.

Runs everything that rlswitch claims about a GPU, stage by stage, each in its own processes and with a time
limit. Writes benchmarks/results/gpu-NAME-DATE.json and a table beside it; exits with 1 if a stage failed.
Without a GPU it runs the same stages in small. All settings: benchmarks/settings.py. docs/gpu.md tells how
to read the results.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rlswitch.benchmarks.gpu_stages import stage_problems
from rlswitch.benchmarks.program import run
from rlswitch.benchmarks.settings import GpuCheckSettings, words_from_flags

if __name__ == "__main__":
    sys.argv[1:] = words_from_flags(sys.argv[1:])
    run(__doc__, GpuCheckSettings, "gpu_check", "gpu_check", stage_problems, warm=False)
