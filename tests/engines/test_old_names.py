"""Running servers were started with the workers' old names, which must still load for one version."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("rlswitch.engines.worker", "rlswitch.engines.vllm.worker", "ProvenWorker"),
        ("rlswitch.engines.cpu_worker", "rlswitch.engines.vllm.cpu_worker", "SleepingCPUWorker"),
    ],
)
def test_the_old_name_of_a_worker_is_the_same_class(old: str, new: str, name: str) -> None:
    program = f"import {old} as old, {new} as new; assert old.{name} is new.{name}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
