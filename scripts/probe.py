"""python scripts/probe.py model=PATH [key=value ...]: which sleep levels and transports work here?

For each one: does it give back the memory, keep the outputs, stay flat over cycles? A verdict per row,
and runs/probe.json. Every setting stands in rlswitch/bench/settings.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rlswitch.bench.settings import ProbeSettings
from rlswitch.cli import guarded
from rlswitch.forkserver import prepare
from rlswitch.leave import leave
from rlswitch.options import settings_from_words


def main(words: list[str]) -> int:
    settings = settings_from_words(ProbeSettings, words)
    prepare()
    from rlswitch.bench.probe import probe  # torch and vLLM come with it

    return probe(settings)


if __name__ == "__main__":  # vLLM starts its processes by importing this file again
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        sys.exit()
    leave(guarded(lambda: main(sys.argv[1:])))
