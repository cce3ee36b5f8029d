"""The rules of the house, read off the source: one vendor one place, small files, light imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rlswitch"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {str(file.relative_to(PACKAGE)): ast.parse(file.read_text()) for file in FILES}

MAX_FILE, MAX_FUNCTION = 400, 60
VENDORS = {
    "vllm": {"engines/"},
    "aiohttp": {"engines/"},
    "wandb": {"monitor.py"},
    "accelerate": {"trainer.py", "monitor.py"},
    "peft": {"lora.py"},
}
ENGINE_WORDS = {"sleep", "wake_up", "reload_weights"}
HEAVY = {"torch", "vllm", "transformers", "accelerate", "datasets", "wandb"}
LIGHT = (
    *("config", "cli", "compose", "arguments", "sweep", "environment", "inputs", "types", "options"),
    *("data", "pretrained", "rewards.fit", "rewards.scorer", "torchless", "tasks.addition"),
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def test_there_is_something_to_check():
    assert len(TREES) > 30 and "engines/base.py" in TREES


def imports(tree: ast.AST) -> Iterator[str]:
    """Top-level names of everything imported, wherever the statement stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def functions(tree: ast.AST) -> Iterator[Function]:
    yield from (node for node in ast.walk(tree) if isinstance(node, Function))


def names_used(tree: ast.AST) -> Iterator[str]:
    """Every name and attribute that the code itself mentions; no strings, no comments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, Function):
            yield node.name


@pytest.mark.parametrize("vendor", sorted(VENDORS))
def test_a_vendor_is_imported_in_its_places_only(vendor: str):
    found = {name for name, tree in TREES.items() if vendor in imports(tree)}
    strangers = {name for name in found if not name.startswith(tuple(VENDORS[vendor]))}
    assert found and not strangers


def test_only_engines_sleep_wake_and_reload():
    found = {
        f"{name}: {word}"
        for name, tree in TREES.items()
        for word in ENGINE_WORDS.intersection(names_used(tree))
    }
    assert {line.split(": ")[1] for line in found} == ENGINE_WORDS
    assert not {line for line in found if not line.startswith("engines/")}


def test_the_cache_is_emptied_in_one_function():
    found = [
        f"{name}:{function.name}"
        for name, tree in TREES.items()
        for function in functions(tree)
        if "empty_cache" in names_used(function)
    ]
    assert found == ["device.py:reclaim"]


def test_nobody_asks_what_an_object_has():
    assert not {name for name, tree in TREES.items() if "hasattr" in names_used(tree)}


def test_files_stay_small():
    lines = {str(file.relative_to(PACKAGE)): len(file.read_text().splitlines()) for file in FILES}
    assert not {name: count for name, count in lines.items() if count > MAX_FILE}


def test_functions_stay_small():
    lengths = {
        f"{name}:{function.name}": (function.end_lineno or 0) - function.lineno + 1
        for name, tree in TREES.items()
        for function in functions(tree)
    }
    assert not {name: length for name, length in lengths.items() if length > MAX_FUNCTION}


def test_every_module_says_what_it_is_for():
    assert not [name for name, tree in TREES.items() if not ast.get_docstring(tree)]


def test_source_is_ascii():
    assert not [file.name for file in FILES if not file.read_bytes().isascii()]


def test_the_trainer_knows_no_algorithm_by_name():
    algorithms = {"rlswitch.algorithms.ppo", "rlswitch.algorithms.grpo"}
    importers = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in algorithms
    }
    assert importers == {"config.py"}


def test_nothing_imports_the_loop_but_the_command_line():
    importers = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "rlswitch.loop"
    }
    assert importers <= {"cli.py"}


def test_the_command_line_loads_nothing_heavy():
    modules = ", ".join(f"rlswitch.{name}" for name in LIGHT)
    code = f"import sys, {modules}; print(*({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_no_shell_script_pipes_into_a_reader_that_stops_early():
    """Under pipefail `make --version | head -n 1` fails now and then: make was still writing."""
    scripts = [*ROOT.glob("scripts/*.sh"), *ROOT.glob("recipes/**/*.sh"), ROOT / ".ci" / "run"]
    early = re.compile(r"\|\s*(head\b|grep\s+(-\w*[qm]|--quiet))")
    found = {
        f"{script.name}: {line.strip()}" for script in scripts for line in script.open() if early.search(line)
    }
    assert len(scripts) > 1 and not found
