"""Everything that the documentation names exists: links, files, settings, package folders."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*/README.md")]
)
FOLDERS = ("benchmarks", "conf", "docs", "recipes", "requirements", "rlswitch", "scripts", "tests")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./*-]*")
CODE = re.compile(r"`([^`\n]+)`")
SETTING = re.compile(r"(?<![\w.+~/-])([a-z_]+(?:\.[a-z_0-9]+)+)(?==|$)")
MODULE = re.compile(r"python -m (rlswitch[.a-z_]*)")
PLACEHOLDER = re.compile(r"\b[A-Z]{2,}\b|NNN")
OPEN = ("engine.vllm.", "trainer.lr_schedule_kwargs.")
"""Mappings that take any key."""
WRONG_ON_PURPOSE = {"faults.md"}
FILES = (".json", ".jsonl", ".log", ".py")
KINDS = ("json", "python")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_relative_links_lead_somewhere(page: Path) -> None:
    missing = []
    for target in LINK.findall(page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(target)
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_named_files_exist(page: Path) -> None:
    """Paths from the root of the checkout, in text and in code; `tests/*.py` needs one match."""
    named_files = {name.rstrip(".") for name in FILE.findall(page.read_text())}
    missing = {
        name
        for name in named_files
        if not PLACEHOLDER.search(Path(name).stem) and not list(ROOT.glob(name.rstrip("/")))
    }
    assert missing == set()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_modules_to_run_exist(page: Path) -> None:
    for module in MODULE.findall(page.read_text()):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in WRONG_ON_PURPOSE], ids=named)
def test_named_settings_exist(page: Path) -> None:
    """Every `section.key=value` in code, and every `section.key` alone between backticks."""
    settings = set((ROOT / "tests" / "surface.txt").read_text().split())
    sections = {key.partition(".")[0] for key in settings if "." in key}
    text = page.read_text()
    code = [*re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE), *CODE.findall(text)]
    keys = {key for part in code for key in SETTING.findall(part)}
    assert {
        key
        for key in keys - settings
        if key.partition(".")[0] in sections and not key.startswith(OPEN) and not key.endswith(FILES)
    } == set()


def test_the_map_in_the_readme_names_every_folder_of_the_package() -> None:
    text = (ROOT / "README.md").read_text()
    tree = re.search(r"^rlswitch/\n((?:  .*\n)+)", text, re.MULTILINE)
    assert tree is not None
    listed = re.findall(r"^  ([a-z_]+/) ", tree[1], re.MULTILINE)
    folders = [f"{it.parent.name}/" for it in (ROOT / "rlswitch").glob("*/__init__.py")]
    assert sorted(listed) == sorted(folders)
    files = re.findall(r"([a-z_]+\.py)", tree[1])
    assert [name for name in files if not (ROOT / "rlswitch" / name).is_file()] == []


def test_the_readmes_reward_is_right_about_its_rows() -> None:
    text = (ROOT / "README.md").read_text()
    rows, program = (re.search(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE) for kind in KINDS)
    assert rows is not None and program is not None
    answers = [json.loads(line)["answer"] for line in rows[1].splitlines()]
    names: dict[str, Any] = {}
    exec(program[1], names)
    for completion, expected in (("It is {}.", 1.0), ("It is {}, not 5", 0.0), ("I do not know", 0.0)):
        texts = [[{"role": "assistant", "content": completion.format(answer)}] for answer in answers]
        assert names["correct"](prompts=[], completions=texts, answer=answers) == [expected] * len(answers)


def test_the_index_names_every_page() -> None:
    linked = set(LINK.findall((ROOT / "docs" / "README.md").read_text()))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= linked
