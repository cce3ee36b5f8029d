"""python scripts/answers.py [JSON]: measure how fast each bad input is rejected.

Runs every row of tests/bad_inputs.py that needs no other machine in a process of its own, checks the exit
code and the number of error lines (tests/command/test_faults.py checks their text), and writes the seconds
(default: benchmarks/results/answers-cpu.json).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "command"))

from bad_inputs import BAD_INPUTS, BASE, ROWS, BadInput
from conftest import make_tiny_model
from rlswitch.benchmarks.tables import hardware
from test_faults import lay, lay_model

from rlswitch.records.provenance import versions
from rlswitch.switch.device import Device

ROOT = Path(__file__).resolve().parents[1]
WORDS = BASE.replace(" engine.fork_server=false", "")
"""With the fork server, which is the default."""


def answer(given: BadInput, model: Path) -> tuple[float, str]:
    """Seconds until the process exits, and the unexpected outcome (empty if none)."""
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        lay(here, {"rows.jsonl": ROWS, **given.files})
        lay_model(here / "model", model, given.model)
        command = [sys.executable, str(ROOT / "train.py"), *WORDS.split(), *given.words.split()]
        began = time.perf_counter()
        done = subprocess.run(command, cwd=here, capture_output=True, text=True)
        seconds = time.perf_counter() - began
    lines = len(done.stderr.splitlines())
    wrong = "" if (done.returncode, lines) == (2, len(given.says)) else f"{done.returncode}: {done.stderr}"
    return seconds, wrong


def main(path: Path) -> int:
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    asked = [given for given in BAD_INPUTS if not given.machine]
    waited: dict[bool, dict[str, float]] = {False: {}, True: {}}
    failures = 0
    with tempfile.TemporaryDirectory() as name:
        model = make_tiny_model(Path(name), tie=True).path
        for given in asked:
            seconds, wrong = answer(given, model)
            waited[given.needs_torch][given.about] = round(seconds, 2)
            failures += bool(wrong)
            print(f"{seconds:5.2f} s  {given.about}{f': {wrong}' if wrong else ''}", flush=True)
    result = {
        name: {
            "inputs": len(rows),
            "median_s": sorted(rows.values())[len(rows) // 2],
            "longest_s": max(rows.values()),
            "under_3_s": sum(seconds < 3 for seconds in rows.values()),
            "seconds": dict(sorted(rows.items(), key=lambda row: -row[1])),
        }
        for name, rows in (("before torch", waited[False]), ("after torch", waited[True]))
    }
    path.write_text(
        json.dumps(result | {"hardware": hardware(Device.detect()), "versions": versions()}, indent=1) + "\n"
    )
    print(path)
    return bool(failures)


if __name__ == "__main__":
    target = sys.argv[1] if sys.argv[1:] else ROOT / "benchmarks" / "results" / "answers-cpu.json"
    sys.exit(main(Path(target)))
