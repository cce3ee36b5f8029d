"""python scripts/report.py RUN_DIR: write RUN_DIR/report.html, one self-contained file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rlswitch.errors import ConfigError
from rlswitch.report.page import write_report


def main() -> int:
    parser = argparse.ArgumentParser(description="Write RUN_DIR/report.html, one self-contained file.")
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="a run directory")
    try:
        print(write_report(parser.parse_args().run_dir))
    except (ConfigError, OSError) as error:
        print(f"rlswitch: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
