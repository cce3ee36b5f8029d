"""scripts/probe.py on the real vLLM."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "probe.py"


def run(directory: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        cwd=directory,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_every_level_and_transport_works_on_a_cpu(tmp_path: Path) -> None:
    done = run(tmp_path, "cycles=2", "kv_cache_gib=0.125")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "runs" / "probe.json").read_text())
    rows = {(row["level"], row["transport"]): row for row in found["verdicts"]}
    assert set(rows) == {
        ("0", "none"),
        ("kv", "none"),
        ("1", "none"),
        ("2", "none"),
        ("2", "disk"),
        ("2", "shm"),
    }
    assert all(row["works"] for row in rows.values()), rows
    freed = {level: rows[level, "none"]["freed_bytes"] for level in ("0", "kv", "2")}
    assert freed["0"] < freed["kv"] < freed["2"]


def test_a_misspelt_setting_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = run(tmp_path, "modle=x")
    assert done.returncode == 2
    assert done.stderr.startswith("rlswitch: error: modle=x: unknown setting; did you mean 'model'?")
    assert not (tmp_path / "runs").exists()
