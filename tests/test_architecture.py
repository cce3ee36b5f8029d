"""Architecture rules, checked on the source: one place per vendor, small files, light imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rlswitch"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {str(file.relative_to(PACKAGE)): ast.parse(file.read_text()) for file in FILES}

MAX_FILE, MAX_CLASS, MAX_FUNCTION, MAX_PARAMETERS = 400, 250, 50, 8
MAX_PACKAGE, MAX_CORE, MAX_ROOT = 13_250, 8_000, 12

RANKS = (
    "errors types seeds text | config proof processes | algorithms | run | data records | switch report |"
    " engines training | rewards planning rollouts | serving | checkpoint inputs | session |"
    " build evaluation | loop | command"
)
"""The rooms, a file or a folder of the root each. A room imports only from ranks to the left of its own."""
RANK = {room: rank for rank, rooms in enumerate(RANKS.split("|")) for room in rooms.split()}

PERIPHERY = {
    *("command", "records", "report", "planning", "serving", "processes", "checkpoint"),
    *("rewards.workers", "rewards.sandbox"),
}
WIRING = {"session", "build", "evaluation", "loop", "inputs"}
"""Modules that assemble a run: they know both sides."""
SEAMS: set[tuple[str, str]] = {
    ("switch", "records"),  # the ledger writes JSON lines
    ("engines", "processes"),  # an engine runs in processes
    ("rewards", "rewards.workers"),  # so do reward functions
}
SHIMS = {"engines/worker.py", "engines/cpu_worker.py"}
"""Old module names that running servers use; delete with the next version."""

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
Trees = dict[str, ast.Module]


def imports(tree: ast.AST) -> Iterator[str]:
    """Top-level names of all imports, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def functions(tree: ast.AST) -> Iterator[Function]:
    yield from (node for node in ast.walk(tree) if isinstance(node, Function))


def names_used(tree: ast.AST) -> Iterator[str]:
    """Every name and attribute in the code, without strings and comments."""
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


def room_of(name: str) -> str:
    """`rewards.workers` of "rewards/workers/pool.py", `loop` of "loop.py"."""
    *folders, file = name.removesuffix(".py").split("/")
    room = ".".join(folders[:2]) if folders else file
    return room if room in PERIPHERY or not folders else folders[0]


def modules_imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name) of what is imported from rlswitch, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide where they go"
            if (node.module or "").split(".")[0] == "rlswitch":
                yield from ((str(node.module), alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((it.name, "") for it in node.names if it.name.split(".")[0] == "rlswitch")


def imports_between_rooms(trees: Trees) -> Iterator[tuple[str, str, str]]:
    """(file, its room, the room that it imports from)."""
    for name, tree in trees.items():
        if name in SHIMS or name == "__init__.py":
            continue
        for module, item in modules_imported(tree):
            parts = [*module.split(".")[1:], item] if module == "rlswitch" else module.split(".")[1:]
            assert any(parts), f"{name} imports the whole package"
            folder = any(it.startswith("/".join(parts) + "/") for it in trees)
            target = room_of("/".join(parts) + ("/__init__.py" if folder else ".py"))
            if target != room_of(name):
                yield name, room_of(name), target


def upward_imports(trees: Trees) -> Iterator[str]:
    for name, room, target in imports_between_rooms(trees):
        here, there = room.split(".")[0], target.split(".")[0]
        if here != there and RANK[there] >= RANK[here]:
            yield f"{name} imports {target}"


def circular_imports(trees: Trees) -> Iterator[str]:
    graph: dict[str, set[str]] = {name: set() for name in trees}
    for name, tree in trees.items():
        for module, item in modules_imported(tree):
            base = module.split(".")[1:]
            inner = "/".join([*base, item]) + ".py"
            graph[name].add(inner if inner in trees else "/".join(base) + ".py")
    for name in graph:
        seen: set[str] = set()
        todo = [*graph[name]]
        while todo:
            if (here := todo.pop()) not in seen:
                seen.add(here)
                todo += graph.get(here, ())
        if name in seen:
            yield name


def core_imports_of_the_periphery(trees: Trees) -> Iterator[str]:
    for name, room, target in imports_between_rooms(trees):
        core = room not in PERIPHERY | WIRING
        if core and target in PERIPHERY and (room, target) not in SEAMS:
            yield f"{name} imports {target}"


def rooms_without_a_rank(trees: Trees) -> Iterator[str]:
    rooms = {room_of(name).split(".")[0] for name in trees} - {"__init__"}
    yield from rooms ^ set(RANK)


def large_parts(trees: Trees) -> Iterator[str]:
    """Functions, classes and constructors over their limits."""
    limits = {ast.FunctionDef: MAX_FUNCTION, ast.AsyncFunctionDef: MAX_FUNCTION, ast.ClassDef: MAX_CLASS}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, Function | ast.ClassDef) and lines_of(node) > limits[type(node)]:
                yield f"{name}: {node.name} has {lines_of(node)} lines"
            if isinstance(node, Function) and node.name == "__init__":
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if len(arguments) - 1 > MAX_PARAMETERS:
                    yield f"{name}: a constructor has {len(arguments) - 1} parameters"


def files_in_the_root(trees: Trees) -> Iterator[str]:
    root = [name for name in trees if "/" not in name]
    yield from root[MAX_ROOT:]


RULES = (
    *(upward_imports, circular_imports, core_imports_of_the_periphery),
    *(rooms_without_a_rank, large_parts, files_in_the_root),
)


@pytest.mark.parametrize("rule", RULES)
def test_the_package_keeps_the_rule(rule: Callable[[Trees], Iterable[str]]):
    assert not list(rule(TREES))


LONG = "\n".join(["    x = 1"] * MAX_CLASS)
BREACHES = [
    (upward_imports, {"types.py": "from rlswitch.switch.switch import Switch"}),
    (upward_imports, {"types.py": "def late():\n    from rlswitch import loop"}),
    (upward_imports, {"text.py": "if TYPE_CHECKING:\n    from rlswitch.run import Run"}),
    (upward_imports, {"data/hub.py": "import rlswitch.records.jsonl"}),
    (
        circular_imports,
        {"text.py": "from rlswitch.seeds import a", "seeds.py": "from rlswitch.text import b"},
    ),
    (
        circular_imports,
        {
            "proof/checks.py": "from rlswitch.proof import canary as c",
            "proof/canary.py": "from rlswitch.proof.checks import d",
        },
    ),
    (core_imports_of_the_periphery, {"training/trainer.py": "from rlswitch.records.jsonl import Summary"}),
    (core_imports_of_the_periphery, {"rewards/rewards.py": "from rlswitch.rewards.sandbox.sandbox import S"}),
    (rooms_without_a_rank, {"helpers.py": ""}),
    (rooms_without_a_rank, {"plugins/one.py": ""}),
    (large_parts, {"text.py": f"class Everything:\n{LONG}"}),
    (large_parts, {"text.py": f"def everything():\n{LONG}"}),
    (large_parts, {"text.py": "class A:\n    def __init__(self, a, b, c, d, e, f, *, g, h, i): ..."}),
    (files_in_the_root, {f"more{number}.py": "" for number in range(MAX_ROOT)}),
]


@pytest.mark.parametrize(("rule", "files"), BREACHES)
def test_a_breach_of_the_rule_is_found(rule: Callable[[Trees], Iterable[str]], files: dict[str, str]):
    assert list(rule(TREES | {name: ast.parse(text) for name, text in files.items()}))


def test_files_the_package_and_its_core_stay_small():
    lines = {name: len((PACKAGE / name).read_text().splitlines()) for name in TREES}
    assert not {name: count for name, count in lines.items() if count > MAX_FILE}
    core = sum(count for name, count in lines.items() if room_of(name) not in PERIPHERY)
    assert sum(lines.values()) <= MAX_PACKAGE
    assert core <= MAX_CORE


def test_every_module_says_what_it_is_for():
    assert not [name for name, tree in TREES.items() if not ast.get_docstring(tree)]


def test_source_is_ascii():
    assert not [file.name for file in FILES if not file.read_bytes().isascii()]


def test_nobody_forges_a_run_to_get_an_engine():
    """An EngineSpec holds everything an engine needs, so engines and their users need no Run."""
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
    """Under pipefail `make --version | head -n 1` fails occasionally, while make still writes."""
    scripts = [*ROOT.glob("scripts/*.sh"), *ROOT.glob("recipes/**/*.sh"), ROOT / ".ci" / "run"]
    early = re.compile(r"\|\s*(head\b|grep\s+(-\w*[qm]|--quiet))")
    found = {
        f"{script.name}: {line.strip()}" for script in scripts for line in script.open() if early.search(line)
    }
    assert len(scripts) > 1 and not found
