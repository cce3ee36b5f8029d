"""python scripts/bench_switch.py [key=value ...]: what switching costs here, in every mode.

Two models take turns: with a restart each time, and asleep at each level, in process and over HTTP.
`model_a=` and `model_b=` take directories or hub ids; without them two small ones are made on the spot.
Every setting stands in rlswitch/bench/settings.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rlswitch.bench.settings import BenchSettings
from rlswitch.cli import guarded
from rlswitch.forkserver import prepare
from rlswitch.leave import leave
from rlswitch.options import settings_from_words
from rlswitch.types import ConfigError


def main(words: list[str]) -> int:
    settings = settings_from_words(BenchSettings, words)
    if wrong := list(settings.problems()):
        raise ConfigError(*wrong)
    prepare()
    from rlswitch.bench.command import bench_switch  # torch and vLLM come with it

    return bench_switch(settings)


if __name__ == "__main__":  # vLLM starts its processes by importing this file again
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        sys.exit()
    leave(guarded(lambda: main(sys.argv[1:])))
