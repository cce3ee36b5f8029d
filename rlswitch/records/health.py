"""What a run must not go on doing for long: updates that are left out, rewards that teach nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rlswitch.checkpoint.resume import Start, whole_in
from rlswitch.errors import RLSwitchError
from rlswitch.records.jsonl import LineFile
from rlswitch.records.monitor import rollout_record
from rlswitch.types import Group

SKIPPED_IN_A_ROW = 3
FLAT_IN_A_ROW, FLAT_ENDS = 10, 50
"""Steps without a gradient: after so many it is said, after so many the run ends."""
SKIPPED = "skipped"


class Health:
    """Counts the bad steps in a row; the metrics of each are recorded by then."""

    def __init__(self, output_dir: Path, start: Start, say: Callable[[str], None]):
        self._output_dir = output_dir
        self._say = say
        self.skipped_in_a_row = start.state.skipped_in_a_row
        self.flat_in_a_row = start.state.flat_in_a_row
        for path in (output_dir / SKIPPED).glob("step_*.jsonl"):
            step = path.stem.removeprefix("step_")
            if step.isdecimal() and int(step) > start.kept:
                path.unlink()

    def check(
        self, step: int, metrics: Mapping[str, float], skipped: Sequence[str], groups: Sequence[Group]
    ) -> None:
        """`skipped`: what was left out of the step's update, and why.

        Raises RLSwitchError for the third such step in a row: the policy has stopped learning.
        """
        self.flat_in_a_row = self.flat_in_a_row + 1 if metrics.get("actor/grad_norm") == 0.0 else 0
        if self.flat_in_a_row == FLAT_IN_A_ROW:
            self._say(self._flat())
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if not skipped:
            return
        path = write_down(self._output_dir, step, groups)
        what = f"step {step}: {skipped[0]}: {_count(len(skipped))} left out, its rollouts are in {path}"
        if self.skipped_in_a_row < SKIPPED_IN_A_ROW:
            self._say(what)
            return
        raise RLSwitchError(
            f"{what}; it was so in {SKIPPED_IN_A_ROW} steps in a row; {self._last_checkpoint()};"
            " lower trainer.lr, or look for extreme rewards in these files"
        )

    @property
    def end(self) -> str:
        """Why it would be in vain to go on, or nothing."""
        return self._flat() if self.flat_in_a_row and self.flat_in_a_row % FLAT_ENDS == 0 else ""

    def _flat(self) -> str:
        return (
            f"the policy's gradient was 0 in each of the last {self.flat_in_a_row} steps: rewards that are"
            " compared do not differ, or all completions are cut off; look at rollouts.jsonl: the task may"
            " be solved, too hard, or misread"
        )

    def _last_checkpoint(self) -> str:
        whole = next(whole_in(self._output_dir / "checkpoints"), None)
        return f"the last good checkpoint is {whole}" if whole else "no checkpoint was saved yet"


def write_down(output_dir: Path, step: int, groups: Sequence[Group]) -> Path:
    """The rollouts of a step with their tokens and log-probabilities, one JSON object a line."""
    path = output_dir / SKIPPED / f"step_{step:06d}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    file = LineFile(path, allow_nan=True)
    try:
        file.append(
            rollout_record(step, it)
            | {"reward": it.reward, "prompt_token_ids": it.prompt.token_ids}
            | {"token_ids": it.token_ids, "logprobs": it.logprobs}
            for group in groups
            for it in group.rollouts
        )
    finally:
        file.close()
    return path


def _count(number: int) -> str:
    return "an update is" if number == 1 else f"{number} updates are"
