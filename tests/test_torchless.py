"""What is read before torch is imported: in a process that has none, with the same result."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from bad_inputs import BAD_INPUTS, BASE, ROWS
from test_faults import lay, lay_model

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[1]
APART = [
    "prompts that are too long",
    "a split that the data does not have",
    "a chat template that fails",
    "functions that do not take the columns there are",
    "questions longer than the judge's context",
    "a model that generates no text",
]
"""Inputs that need a tokenizer, a configuration or a reward function to be told wrong."""


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment in which a torch that is imported ends the process."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "torch.py").write_text("import os; os.write(2, b'torch is imported'); os._exit(9)")
    paths = [str(tmp_path / "bare"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


@pytest.mark.parametrize("about", APART)
def test_a_wrong_input_is_told_before_torch_is_imported(about, bare, tiny_model, tmp_path):
    given = next(it for it in BAD_INPUTS if it.about == about)
    here = tmp_path / "here"
    lay(here, {"rows.jsonl": ROWS, **given.files})
    lay_model(here / "model", tiny_model().path, given.model)
    words = [*BASE.split(), *given.words.split()]
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *words], cwd=here, env=bare, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, len(given.says)), done.stderr
    assert done.stderr.startswith("rlswitch: error: ")


def run_code(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done


def test_prompts_are_the_same_without_torch_and_with_it(tiny_model, tmp_path):
    lay(tmp_path, {"rows.jsonl": ROWS})
    code = f"""
        import sys
        from rlswitch.command.compose import Source, compose_run
        from rlswitch.data.prompts import read_tables
        from rlswitch.inputs import tokenize
        from rlswitch.command.torchless import Torchless
        words = {BASE!r}.replace("model=model", "model={tiny_model().path}").split()
        run = compose_run(words, Source.default())
        apart = Torchless().ask(tokenize, run, read_tables(run), run.model.path, print)()
        assert "torch" not in sys.modules and "transformers" not in sys.modules
        import torch
        here = Torchless().ask(tokenize, run, read_tables(run), run.model.path, print)()
        for one, other in zip(apart, here):
            one, other = ((it.take(50), it.cursor) if hasattr(it, "take") else it for it in (one, other))
            assert one == other and one
        print("the same")
    """
    said = run_code(code, tmp_path).stdout.splitlines()
    assert said[-1] == "the same" and said[0] == said[1] and said[0].startswith("data: held out 2 of")


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        ("return 5", "5 child"),
        ("raise ConfigError('a', 'b')", "ConfigError a/b child"),
        ("import torch; return torch.tensor(3).item()", "3 here"),  # the child has none
        ("import os; os.kill(os.getpid(), 9) if child() else None; return 7", "7 here"),
        ("raise LookupError('odd')", "LookupError odd here"),
        ("return lambda: 0", "function here"),  # cannot be sent back
        (
            "try: import torch\n    except ImportError: raise ConfigError('no torch')\n    return 8",
            "8 here",  # refused for want of torch only
        ),
    ],
)
def test_what_the_child_cannot_answer_is_answered_here(body: str, answer: str, tmp_path):
    code = f"""
import os
from rlswitch.command.torchless import Torchless
from rlswitch.errors import ConfigError

parent = os.getpid()

def child():
    return os.getpid() != parent

def call():
    open("callers", "a").write("child " if child() else "here ")
    {body}

try:
    said = Torchless().ask(call)()
    said = "function" if callable(said) else said
except ConfigError as error:
    said = "ConfigError " + "/".join(error.problems)
except Exception as error:
    said = f"{{type(error).__name__}} {{error}}"
print(said, open("callers").read().split()[-1])
"""
    done = run_code(code, tmp_path)
    assert (done.stdout.strip(), done.stderr) == (answer, "")
