"""The programs in docs/, run as printed."""

import re
from contextlib import ExitStack
from pathlib import Path

import pytest
from runs import finish, program
from samples import greedy

from rlswitch.engines.spec import Launch
from rlswitch.engines.vllm.server import launched
from rlswitch.serving.serve import frozen_spec
from rlswitch.switch.device import Device

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]


def block(page: str, number: int = 0) -> str:
    """The `number`th Python block of a page under docs/."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)[number]


def run_block(text: str, directory: Path, *words: object) -> list[str]:
    """Runs a program in a separate process and returns the lines it printed."""
    file = directory / "program.py"
    file.write_text(text)
    done = finish(program, [file, *words], directory)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout.splitlines()


def test_two_models_take_turns(tiny_model, tmp_path: Path) -> None:
    models = [tiny_model(tie=True), tiny_model(tie=False)]
    lines = run_block(block("switching.md"), tmp_path, *(tiny.path for tiny in models))
    expected = [f"{tiny.path}: {greedy(tiny, '12+34=', 8)!r}, proven: True" for tiny in models]
    assert expected[0] != expected[1]
    assert [line for line in lines if "proven" in line] == expected * 2


def test_two_running_servers_take_turns(tiny_model, tmp_path: Path) -> None:
    models = [tiny_model(tie=True), tiny_model(tie=False)]
    with ExitStack() as stack:
        addresses = []
        for index, tiny in enumerate(models):
            settings = {"listen": "127.0.0.1:0", "max_model_len": 64, "kv_cache_gib": 0.0625}
            launch = Launch(
                spec=frozen_spec(str(tiny.path), server=True, **settings),
                tokenizer=tiny.tokenizer,
                device=Device.detect(),
                log_path=tmp_path / f"server-{index}.log",
                scratch=tmp_path / "scratch",
            )
            client, _ = stack.enter_context(launched(launch))
            addresses.append(client.address)
        lines = run_block(block("switching.md"), tmp_path, *addresses)
    expected = [f"{tiny.path}: {greedy(tiny, '12+34=', 8)!r}, proven: True" for tiny in models]
    assert [line for line in lines if "proven" in line] == expected * 2
