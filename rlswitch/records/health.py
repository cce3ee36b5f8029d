"""Ends a run that stopped learning: updates skipped in a row, or steps without a gradient."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlswitch.errors import RLSwitchError
from rlswitch.records.jsonl import replacing
from rlswitch.records.monitor import rollout_record
from rlswitch.types import Group

SKIPPED_IN_A_ROW = 3
FLAT_IN_A_ROW, FLAT_ENDS = 10, 50
"""Steps in a row without a gradient after which the run warns, and after which it ends."""
SKIPPED = "skipped"


@dataclass(slots=True)
class Health:
    """Counts bad steps in a row. Their metrics have been recorded by the time it raises."""

    output_dir: Path
    log: Callable[[str], None]
    last_checkpoint: Callable[[], Path | None]
    kept: int = 0
    """Step of the checkpoint that the run resumes from, and its counts."""
    skipped_in_a_row: int = 0
    flat_in_a_row: int = 0

    def __post_init__(self) -> None:
        for path in (self.output_dir / SKIPPED).glob("step_*.jsonl"):
            step = path.stem.removeprefix("step_")
            if step.isdecimal() and int(step) > self.kept:
                path.unlink()

    def check(
        self, step: int, metrics: Mapping[str, float], skipped: Sequence[str], groups: Sequence[Group]
    ) -> None:
        """`skipped`: why, for each skipped update. Raises RLSwitchError for the third such step in a row."""
        self.flat_in_a_row = self.flat_in_a_row + 1 if metrics.get("actor/grad_norm") == 0.0 else 0
        if self.flat_in_a_row == FLAT_IN_A_ROW:
            self.log(self._flat())
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if not skipped:
            return
        path = write_skipped(self.output_dir, step, groups)
        updates = f"{len(skipped)} update{'s' * (len(skipped) > 1)}"
        line = f"step {step}: {skipped[0]}: skipped {updates}; the step's rollouts are in {path}"
        if self.skipped_in_a_row < SKIPPED_IN_A_ROW:
            self.log(line)
            return
        last = self.last_checkpoint()
        saved = f"the last good checkpoint is {last}" if last else "no checkpoint was saved yet"
        raise RLSwitchError(
            f"{line}; {SKIPPED_IN_A_ROW} such steps in a row; {saved}; lower trainer.lr, or look for extreme"
            " rewards in these files"
        )

    @property
    def end(self) -> str:
        """Why continuing is pointless; empty while it is not."""
        return self._flat() if self.flat_in_a_row and self.flat_in_a_row % FLAT_ENDS == 0 else ""

    def _flat(self) -> str:
        return (
            f"the policy's gradient was 0 in each of the last {self.flat_in_a_row} steps: the rewards do not"
            " differ or all completions are cut off; is the task solved, too hard, misread? (rollouts.jsonl)"
        )


def write_skipped(output_dir: Path, step: int, groups: Sequence[Group]) -> Path:
    """Writes the rollouts of a step with their tokens and log-probabilities, one JSON object a line."""
    path = output_dir / SKIPPED / f"step_{step:06d}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as file:
        for it in (rollout for group in groups for rollout in group.rollouts):
            record = rollout_record(step, it) | {"reward": it.reward, "prompt_token_ids": it.prompt.token_ids}
            record |= {"token_ids": it.token_ids, "logprobs": it.logprobs}
            file.write(json.dumps(record).encode() + b"\n")
    return path
