"""scripts/probe.py on the real vLLM."""

import json
from pathlib import Path

import pytest
from runs import finish, program

pytestmark = pytest.mark.engine

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "probe.py"


def test_every_level_and_transport_works_on_a_cpu(tmp_path: Path) -> None:
    done = finish(program, [SCRIPT, "cycles=2", "kv_cache_gib=0.125"], tmp_path)
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
    done = finish(program, [SCRIPT, "modle=x"], tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("rlswitch: error: modle=x: unknown setting; did you mean 'model'?")
    assert not (tmp_path / "runs").exists()
