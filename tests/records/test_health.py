"""Steps without progress: what the run records, and when it stops."""

from __future__ import annotations

import json
import math

import pytest

from rlswitch.errors import RLSwitchError
from rlswitch.records.health import Health, write_skipped

BROKEN = ["actor/grad_norm = inf", "actor/grad_norm = nan"]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def health(tmp_path, said) -> Health:
    return Health(tmp_path, said.append, lambda: None)


def test_the_rollouts_of_a_step_that_was_left_out_are_kept(health, said, tmp_path, make_groups):
    groups = make_groups()
    groups[0].rollouts[1].logprobs[0] = math.nan
    health.check(7, {}, BROKEN, groups)
    path = tmp_path / "skipped" / "step_000007.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["token_ids"] for row in rows] == [it.token_ids for group in groups for it in group.rollouts]
    assert math.isnan(rows[1]["logprobs"][0]) and rows[1]["step"] == 7
    assert said == [f"step 7: {BROKEN[0]}: skipped 2 updates; the step's rollouts are in {path}"]


def test_three_in_a_row_end_the_run_and_a_good_one_between_them_does_not(health, said, tmp_path, make_groups):
    for step, skipped in enumerate([BROKEN, BROKEN, [], BROKEN, BROKEN], start=1):
        health.check(step, {}, skipped, make_groups())
    with pytest.raises(RLSwitchError) as error:
        health.check(6, {}, BROKEN[:1], make_groups())
    line = str(error.value)
    assert line.startswith("step 6: actor/grad_norm = inf: skipped 1 update;")
    assert "3 such steps in a row; no checkpoint was saved yet; lower trainer.lr" in line
    assert (tmp_path / "skipped" / "step_000006.jsonl").is_file()


def test_the_end_names_the_last_good_checkpoint(tmp_path, said, make_groups):
    health = Health(tmp_path, said.append, lambda: tmp_path / "step_000002")
    for step in (5, 6):
        health.check(step, {}, BROKEN, make_groups())
    with pytest.raises(RLSwitchError, match=r"the last good checkpoint is .*step_000002;"):
        health.check(7, {}, BROKEN, make_groups())


def test_what_an_interrupted_run_had_counted_counts_on(tmp_path, said, make_groups):
    counted = {"kept": 5, "skipped_in_a_row": 2, "flat_in_a_row": 9}
    health = Health(tmp_path, said.append, lambda: None, **counted)
    health.check(6, {"actor/grad_norm": 0.0}, [], make_groups())
    assert said and health.flat_in_a_row == 10
    with pytest.raises(RLSwitchError, match="3 such steps in a row"):
        Health(tmp_path, said.append, lambda: None, **counted).check(6, {}, BROKEN, make_groups())


def test_the_rollouts_of_steps_that_a_run_goes_back_behind_are_dropped(tmp_path, said, make_groups):
    for step in (3, 4):
        write_skipped(tmp_path, step, make_groups())
    Health(tmp_path, said.append, lambda: None, kept=3)
    assert [path.name for path in (tmp_path / "skipped").iterdir()] == ["step_000003.jsonl"]


def test_steps_without_a_gradient_are_told_once_and_end_the_run_in_the_end(health, said, make_groups):
    for step, norm in enumerate([0.0] * 9 + [0.5] + [0.0] * 49, start=1):
        health.check(step, {"actor/grad_norm": norm}, [], make_groups())
        assert not health.end
    (line,) = said
    assert line.startswith("the policy's gradient was 0 in each of the last 10 steps")
    health.check(60, {"actor/grad_norm": 0.0}, [], make_groups())
    assert "of the last 50 steps: the rewards do not differ" in health.end
    health.check(61, {"actor/grad_norm": 0.0}, [], make_groups())
    assert not health.end  # the count starts again
