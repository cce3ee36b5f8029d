"""python scripts/fault_pages.py: write docs/faults.md from tests/faults.py and tests/bad_inputs.py."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import bad_inputs
import faults

PAGE = Path(__file__).resolve().parents[1] / "docs" / "faults.md"

FAULTS = (
    "The engine reloads its original checkpoint",
    "The engine loads an older version",
    "A bit flips",
    "A tied `lm_head` keeps its old weights",
    "Prefixes cached under older weights are reused",
    "Rollouts come from another policy version",
    "A sleeping engine frees no memory",
    "The engine is killed while it generates",
    "The engine hangs",
    "The engine cannot be restarted",
    "The run is killed in any phase of a step",
    "The scheduler preempts the run",
    "A gradient is NaN or infinite",
    "All rewards are equal, step after step",
    "The forward pass runs out of memory",
    "A checkpoint is truncated",
    "The disk fills up during a save",
    "A reward function raises",
    "A model-written program uses the network",
    "A tracker (W&B, TensorBoard) raises",
)
"""The faults on the page, by `about`: those that a user is likely to meet."""

BAD_INPUTS = (
    "a recipe that does not exist",
    "a misspelt key",
    "several values without -m",
    "no model and no data",
    "several mistakes, each reported once",
    "a group of one for an algorithm with a group baseline",
    "minibatches that do not divide the rollouts of a step",
    "micro-batches smaller than a rollout",
    "a misspelt file",
    "a misspelt column",
    "a row that is not JSON",
    "prompts that are too long",
    "fewer rows than a step has prompts",
    "a misspelt function",
    "functions whose arguments do not match the columns",
    "a language model as reward model",
    "a hub model that is not cached, offline",
    "pickled weights",
    "chat messages for a model without a chat template",
    "rollouts longer than the model's context",
)
"""The bad inputs on the page, by `about`."""

TEMPLATE = """# Faults and bad inputs

A selection: the tests cover [{num_faults} faults](../tests/faults.py) and
[{num_inputs} bad inputs](../tests/bad_inputs.py). `python scripts/fault_pages.py` writes this page from those
tables; do not edit it.

Exit codes: 0 done; 2 wrong configuration or input; 3 a push could not be proven; 75 stopped by a signal,
checkpoint saved; 130 Ctrl-C; anything else is a crash. Whatever the exit code, the last checkpoint is intact
([fault tolerance](reliability.md)).

## Faults

Each is injected by the linked test.

{faults}
## Bad inputs

rlswitch prints each line below to stderr after `rlswitch: error: ` and exits with code 2: no traceback (set
`HYDRA_FULL_ERROR=1` to get one), no run directory. It reports all wrong settings together, then all wrong
files, then problems that only the tokenizer, the model or the code of a reward function can reveal. `...`
stands for text that depends on the machine. Every command starts with

```
python train.py {base}
```

where `rows.jsonl` has 20 rows with `prompt` and `answer`, and `model/` is a two-layer model.

{bad_inputs}
`python scripts/answers.py` measures how fast each bad input is rejected
([answers-cpu.json](../benchmarks/results/answers-cpu.json)).
"""


def page() -> str:
    """The text of docs/faults.md. Raises KeyError for a row that is not in the tables."""
    fault = {it.about: it for it in faults.FAULTS}
    bad_input = {it.about: it for it in bad_inputs.BAD_INPUTS}
    return TEMPLATE.format(
        num_faults=len(fault),
        num_inputs=len(bad_input),
        base=bad_inputs.BASE,
        faults=_table(
            ("fault", "injected by", "what rlswitch does", "test"),
            ((it.about, it.injected, it.does, _link(it.test)) for it in (fault[about] for about in FAULTS)),
        ),
        bad_inputs=_table(
            ("bad input", "arguments", "error"),
            (
                (it.about, _code(it.words), "<br>".join(map(_code, it.says)))
                for it in (bad_input[about] for about in BAD_INPUTS)
            ),
        ),
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    cells = [list(head), *map(list, rows)]
    cells.insert(1, ["---"] * len(cells[0]))
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def _code(text: str) -> str:
    return f"`{text}`".replace("|", r"\|") if text else ""


def _link(test: str) -> str:
    file, _, name = test.partition("::")
    return f"[`{name}`](../tests/{file})"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
