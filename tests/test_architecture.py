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

MAX_FILE, MAX_CLASS, MAX_FUNCTION, MAX_PARAMETERS = 400, 250, 50, 8
MAX_PACKAGE, MAX_CORE, MAX_ROOT = 12_500, 8_000, 12

RANKS = (
    "errors types seeds text | config proof processes | algorithms | run | data records | switch report |"
    " engines training | rewards planning | serving | checkpoint inputs | session | build evaluation | loop |"
    " command"
)
"""The rooms, a file or a folder of the root each. A room imports only from ranks to the left of its own."""
RANK = {room: rank for rank, rooms in enumerate(RANKS.split("|")) for room in rooms.split()}

PERIPHERY = {
    *("command", "records", "report", "planning", "serving", "processes", "checkpoint"),
    *("rewards.workers", "rewards.sandbox"),
}
WIRING = {"session", "build", "evaluation", "loop", "inputs"}
"""What puts a run together knows both sides."""
SEAMS: set[tuple[str, str]] = {
    ("switch", "records"),  # the ledger writes lines
    ("engines", "processes"),  # an engine lives in processes
    ("rewards", "rewards.workers"),  # and so do reward functions
}
SHIMS = {"engines/worker.py", "engines/cpu_worker.py"}
"""Old places of what running servers name; they go with the next version."""

VENDORS = {
    "vllm": {"engines/vllm/"},
    "aiohttp": {"engines/vllm/"},
    "wandb": {"records/"},
    "accelerate": {"training/trainer.py", "records/"},
    "peft": {"training/lora.py"},
    "vl_convert": {"report/"},
    "jinja2": {"report/"},
}
ENGINE_WORDS = {"sleep", "wake_up", "reload_weights"}
HEAVY = {"torch", "vllm", "transformers", "accelerate", "datasets", "wandb"}
LIGHT = (
    *("run", "inputs", "types", "errors", "text", "config.fields", "config.sections", "command.cli"),
    *("command.compose", "command.arguments", "command.sweep"),
    *("data.prompts", "data.hub", "rewards.models.judge", "rewards.models.reward_model"),
    *("rewards.models.tenant", "rewards.rewards", "recipes.addition.task"),
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


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
    assert found == ["switch/device.py:reclaim"]


def test_nobody_asks_what_an_object_has():
    assert not {name for name, tree in TREES.items() if "hasattr" in names_used(tree)}


def lines_of(node: ast.stmt) -> int:
    """Decorators included."""
    decorators = getattr(node, "decorator_list", [])
    return (node.end_lineno or 0) - min([node.lineno, *(it.lineno for it in decorators)]) + 1


def test_files_stay_small():
    lines = {str(file.relative_to(PACKAGE)): len(file.read_text().splitlines()) for file in FILES}
    assert not {name: count for name, count in lines.items() if count > MAX_FILE}


def test_functions_and_classes_stay_small():
    limits = {ast.FunctionDef: MAX_FUNCTION, ast.AsyncFunctionDef: MAX_FUNCTION, ast.ClassDef: MAX_CLASS}
    found = {
        f"{name}:{node.name}": lines_of(node)
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, Function | ast.ClassDef) and lines_of(node) > limits[type(node)]
    }
    assert not found


def test_constructors_take_few_parameters():
    found = {
        f"{name}:{node.lineno}": len(names)
        for name, tree in TREES.items()
        for node in functions(tree)
        if node.name == "__init__"
        and len(names := [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs][1:])
        > MAX_PARAMETERS
    }
    assert not found


def room_of(name: str) -> str:
    """`rewards.workers` of "rewards/workers/pool.py", `loop` of "loop.py"."""
    *folders, file = name.removesuffix(".py").split("/")
    room = ".".join(folders[:2]) if folders else file
    return room if room in PERIPHERY or not folders else folders[0]


def imports_between_rooms() -> Iterator[tuple[str, str, str]]:
    """(file, its room, the room it imports from); statements in functions and under TYPE_CHECKING count."""
    for name, tree in TREES.items():
        if name in SHIMS or name == "__init__.py":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert not node.level, f"{name}: relative imports hide where they go"
                for alias in node.names if node.module == "rlswitch" else [node]:
                    module = f"rlswitch.{alias.name}" if isinstance(alias, ast.alias) else node.module
                    yield from _arrows(name, module)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    yield from _arrows(name, alias.name)


def _arrows(name: str, module: str) -> Iterator[tuple[str, str, str]]:
    package, *parts = module.split(".")
    if package != "rlswitch":
        return
    assert parts, f"{name}: imports the whole package"
    path = "/".join(parts) + ("/__init__.py" if (PACKAGE / "/".join(parts)).is_dir() else ".py")
    if room_of(path) != room_of(name):
        yield name, room_of(name), room_of(path)


def test_imports_run_down():
    found = {
        f"{name} imports {target}"
        for name, room, target in imports_between_rooms()
        if room.split(".")[0] != target.split(".")[0]
        and RANK[target.split(".")[0]] >= RANK[room.split(".")[0]]
    }
    assert not found


def test_every_room_has_its_rank():
    rooms = {room_of(name).split(".")[0] for name in TREES} - {"__init__"}
    assert rooms == set(RANK)


def test_no_module_imports_itself_in_a_circle():
    graph: dict[str, set[str]] = {}
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("rlswitch"):
                base = node.module.split(".")[1:]
                for alias in node.names:
                    inner = "/".join([*base, alias.name]) + ".py"
                    target = inner if inner in TREES else "/".join(base) + ".py"
                    graph.setdefault(name, set()).add(target)

    def reaches(start: str) -> bool:
        seen, todo = set(), list(graph.get(start, ()))
        while todo:
            here = todo.pop()
            if here == start:
                return True
            if here not in seen:
                seen.add(here)
                todo += graph.get(here, ())
        return False

    assert not {name for name in graph if reaches(name)}


def test_the_core_does_without_the_periphery():
    found = {
        (room, target)
        for _, room, target in imports_between_rooms()
        if room not in PERIPHERY | WIRING and target in PERIPHERY
    }
    assert found == SEAMS


def test_the_package_and_its_core_stay_small():
    lines = {name: len((PACKAGE / name).read_text().splitlines()) for name in TREES}
    core = sum(count for name, count in lines.items() if room_of(name) not in PERIPHERY)
    assert sum(lines.values()) <= MAX_PACKAGE
    assert core <= MAX_CORE


def test_the_root_is_the_story():
    assert len([name for name in TREES if "/" not in name]) <= MAX_ROOT


def test_every_module_says_what_it_is_for():
    assert not [name for name, tree in TREES.items() if not ast.get_docstring(tree)]


def test_source_is_ascii():
    assert not [file.name for file in FILES if not file.read_bytes().isascii()]


def test_nobody_forges_a_run_to_get_an_engine():
    """An EngineSpec says all that an engine needs, so neither engines nor who only wants one know a Run."""
    files = [*(PACKAGE / "engines").rglob("*.py"), *(PACKAGE / "serving").rglob("*.py")]
    files += (ROOT / "benchmarks").rglob("*.py")
    importers = {
        str(file)
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "rlswitch.run"
    }
    assert len(files) > 20 and not importers


def test_an_engine_is_made_behind_one_door():
    found = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("Engine", "RestartingEngine", "LocalBackend", "ServerBackend")
    }
    assert found == {"engines/start.py"}


def test_the_trainer_knows_no_algorithm_by_name():
    algorithms = {"rlswitch.algorithms.ppo", "rlswitch.algorithms.grpo"}
    importers = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in algorithms
    }
    assert importers == {"run.py"}


def test_nothing_imports_the_loop_but_the_command_line():
    importers = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "rlswitch.loop"
    }
    assert importers <= {"command/cli.py"}


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
