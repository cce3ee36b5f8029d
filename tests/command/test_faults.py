"""Every bad input prints its error line; every fault in the table has a test; the page shows both."""

from __future__ import annotations

import ast
import json
import re
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from bad_inputs import BAD_INPUTS, BASE, ROWS, SECTIONS, BadInput
from faults import FAULTS

from rlswitch import inputs
from rlswitch.command import cli

TESTS = Path(__file__).resolve().parents[1]
ERROR = "rlswitch: error: "
LIGHT = [*SECTIONS["The command line"], *SECTIONS["Settings"]]
"""Detectable from the settings alone."""


def forbidden(*args: object, **given: object) -> None:
    raise AssertionError("the run has begun")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    return folder


def lay(folder: Path, files: Mapping[str, Any]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            path.symlink_to(content)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


def lay_model(folder: Path, original: Path, changes: Mapping[str, Any]) -> None:
    """The model's files with `changes` applied: see BadInput.model."""
    files: dict[str, Any] = {file.name: file for file in original.iterdir()} | dict(changes)
    for name, change in changes.items():
        if isinstance(change, dict):
            edited = json.loads((original / name).read_text()) | change
            files[name] = json.dumps({key: value for key, value in edited.items() if value is not None})
    lay(folder, {name: content for name, content in files.items() if content is not None})


def listing(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}  # Python's own


@pytest.mark.parametrize(
    "given",
    [
        # The others start reward workers, lay models out, read them.
        pytest.param(given, id=given.about, marks=[] if given in LIGHT else pytest.mark.processes)
        for given in BAD_INPUTS
    ],
)
def test_a_bad_input_is_answered_in_its_line(
    given: BadInput, here, tmp_path, tiny_model, monkeypatch, capsys
) -> None:
    lay(here, {"rows.jsonl": ROWS, **given.files})
    reached: list[object] = []
    tokenize = inputs.tokenize  # this imports torch
    monkeypatch.setattr(inputs, "tokenize", lambda *parts: reached.append(parts) or tokenize(*parts))
    # Nothing else is replaced: these two are the first steps with side effects.
    monkeypatch.setattr("rlswitch.build.Monitor", forbidden)
    monkeypatch.setattr("rlswitch.command.sweep.run_hydra", forbidden)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    if given not in LIGHT:
        lay_model(here / "model", tiny_model().path, given.model)
    if given.machine:
        given.machine(monkeypatch)
    before = listing(here)
    capsys.readouterr()  # output from creating the tiny model

    assert cli.main([*BASE.split(), *given.words.split()]) == cli.WRONG_CONFIG
    said = capsys.readouterr().err.splitlines()
    patterns = [".*".join(map(re.escape, f"{ERROR}{line}".split("..."))) for line in given.says]
    assert [line for line in said if not any(re.fullmatch(one, line) for one in patterns)] == []
    assert [one for one in patterns if not any(re.fullmatch(one, line) for line in said)] == []
    assert len(said) == len(patterns)
    assert listing(here) == before
    if "mode=plan" not in given.words:  # never reached
        assert bool(reached) == given.needs_torch, "it is told before torch is imported, if it can be"


def test_no_two_bad_inputs_are_called_the_same() -> None:
    names = [given.about for given in BAD_INPUTS]
    assert len(set(names)) == len(names)


def test_every_fault_is_shown_by_a_test_that_exists() -> None:
    assert len({fault.about for fault in FAULTS}) == len(FAULTS)
    trees = {
        file: ast.parse((TESTS / file).read_text()) for file in {it.test.partition("::")[0] for it in FAULTS}
    }
    functions = {
        f"{file}::{node.name}"
        for file, tree in trees.items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }
    assert {fault.test.partition("[")[0] for fault in FAULTS} <= functions
    for fault in FAULTS:
        test, _, case = fault.test.rstrip("]").partition("[")
        words = {
            node.value for node in ast.walk(trees[test.partition("::")[0]]) if isinstance(node, ast.Constant)
        }
        assert not case or case in words, f"{fault.test}: no such case"


def test_the_page_is_what_its_script_makes_of_the_tables() -> None:
    script = runpy.run_path(str(TESTS.parent / "scripts" / "fault_pages.py"))
    assert script["PAGE"].read_text() == script["page"](), "run python scripts/fault_pages.py"
