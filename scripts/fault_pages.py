"""python scripts/fault_pages.py: writes docs/faults.md from tests/faults.py and tests/bad_inputs.py."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import bad_inputs
import faults

PAGE = Path(__file__).resolve().parents[1] / "docs" / "faults.md"


def page() -> str:
    """The page, both tables section by section."""
    return "\n".join([*_faults(), *_bad_inputs()])


def _faults() -> Iterator[str]:
    yield f"""# What goes wrong, and what happens then

Made by `python scripts/fault_pages.py` from the tables that the tests run: do not edit.

A run that cannot go on stops with a line that says why, and its last checkpoint is whole. Exit codes: 2 wrong
configuration or input, 3 a push that could not be proven, 75 stopped by a signal, what was learned saved;
anything else is a crash.

* [{len(faults.FAULTS)} faults](#faults), each injected by a test
* [{len(bad_inputs.BAD_INPUTS)} bad inputs](#bad-inputs), each with the line that answers it

## Faults
"""
    for title, entries in faults.SECTIONS.items():
        yield f"### {title}\n"
        yield _table(
            ("what goes wrong", "how it is injected", "what rlswitch does", "shown by"),
            ((it.about, it.injected, it.does, _link(it.test)) for it in entries),
        )


def _bad_inputs() -> Iterator[str]:
    heavy = sum(it.needs_torch for it in bad_inputs.BAD_INPUTS)
    yield f"""## Bad inputs

Each is answered by its lines on stderr, `rlswitch: error: ` before each, and exit code 2: no traceback (but
with `HYDRA_FULL_ERROR=1`), no run directory. `...` stands for what depends on the machine. All mistakes of
the settings are told at once, then all of the files, then what needs the tokenizer, the model or the code of
a reward function. The words are typed after

```
python train.py {bad_inputs.BASE}
```

where `rows.jsonl` has 20 rows with `prompt` and `answer`, and `model/` is a model of two layers.

All are told before torch is imported, but for {heavy} that only torch, a model's own code or vLLM can tell:
*after torch*. `python scripts/answers.py` measures how long it takes
([answers-cpu.json](../benchmarks/results/answers-cpu.json)).
"""
    for title, entries in bad_inputs.SECTIONS.items():
        yield f"### {title}\n"
        yield _table(
            ("bad input", "words", "answer"),
            ((_situation(it), _code(it.words), "<br>".join(map(_code, it.says))) for it in entries),
        )


def _situation(given: bad_inputs.BadInput) -> str:
    there = f", where {given.machine.__doc__}" if given.machine else ""
    return f"{given.about}{there}{' (*after torch*)' if given.needs_torch else ''}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    cells = [list(head), *map(list, rows)]
    cells.insert(1, ["---"] * len(cells[0]))
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def _code(text: str) -> str:
    """As it is typed; long runs of one character are cut."""
    short = re.sub(r"(.)\1{20,}", r"\1\1\1...", text)
    return f"`{short}`".replace("|", r"\|") if text else ""


def _link(test: str) -> str:
    file, _, name = test.partition("::")
    return f"[`{name}`](../tests/{file})"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
