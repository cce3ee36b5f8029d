"""Comparing the runs of a sweep: runs that differ only in their seed form one arm."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from rlswitch.command.comparison import Job, cells, mean_curve, read_points, write_comparison

ACC = "val/addition/acc"


@pytest.fixture
def make_job(tmp_path: Path):
    """make_job(["recipe=ppo", "seed=1"], [0.4, 0.9]): a finished job with an accuracy per step."""
    numbers = iter(range(99))

    def make(overrides: list[str], accuracies: list[float], exit_code: int = 0) -> Job:
        number = next(numbers)
        directory = tmp_path / str(number)
        directory.mkdir()
        rows = [{"step": i, "timing_s/step": 2.0, ACC: acc} for i, acc in enumerate(accuracies)]
        rows.insert(1, {"step": 0, "timing_s/step": 0.5})  # its time counts, though it has no evaluation
        (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        job = Job(
            number=number, overrides=overrides, exit_code=exit_code, seconds=1.0, directory=str(directory)
        )
        job.read_metrics()
        return job

    return make


def arms_of(jobs: list[Job]) -> dict:
    return dict(iter(read_points(jobs, ACC).groupby("arm", sort=False)))


def test_runs_that_differ_in_their_seed_are_one_arm(make_job, tmp_path):
    jobs = [
        make_job(["recipe=ppo", "seed=0", "num_steps=3"], [0.4, 0.7, 0.9]),
        make_job(["recipe=ppo", "seed=1", "num_steps=3"], [0.2, 0.9, 1.0]),
        make_job(["recipe=grpo", "seed=0", "num_steps=3"], [0.4, 0.5, 0.6]),
    ]
    arms = arms_of(jobs)
    assert list(arms) == ["ppo", "grpo"]
    assert mean_curve(arms["ppo"]) == [pytest.approx(p) for p in ((0, 0.3), (1, 0.8), (2, 0.95))]
    # 0.8 after step 2 (6.5 s) and after step 1 (4.5 s)
    assert cells(arms["ppo"]) == ["2", "0.300", "0.950", "0.900 - 1.000", "6", "1.5"]
    assert cells(arms["grpo"])[-2:] == ["not reached", "-"]


def test_a_mean_is_over_the_steps_that_all_runs_have(make_job):
    arms = arms_of([make_job(["seed=0"], [0.4, 0.6, 1.0]), make_job(["seed=1"], [0.2, 0.4])])
    assert mean_curve(arms["all"]) == [(0, pytest.approx(0.3)), (1, pytest.approx(0.5))]


def test_seconds_are_those_of_the_steps_so_far(make_job):
    job = make_job(["seed=0"], [0.4, 0.5])
    assert list(read_points([job], ACC)["seconds"]) == [2.0, 4.5]


def test_an_arm_says_how_many_of_its_runs_got_there(make_job):
    jobs = [make_job(["seed=0"], [0.4, 0.9]), make_job(["seed=1"], [0.4, 0.5])]
    assert cells(arms_of(jobs)["all"])[-2] == "4 (1 of 2)"


def test_a_job_that_failed_is_not_compared(make_job):
    jobs = [make_job(["seed=0"], [0.4, 0.9]), make_job(["seed=1"], [0.4, 0.0], exit_code=1)]
    assert cells(arms_of(jobs)["all"])[0] == "1"


def test_the_files_hold_every_arm(make_job, tmp_path):
    recipes = "ppo grpo rloo reinforce_pp reinforce_pp_baseline dapo dr_grpo gspo cispo reinforce".split()
    jobs = [make_job([f"recipe={name}", f"seed={s}"], [0.4, 0.9]) for name in recipes for s in (0, 1)]
    table = write_comparison(jobs, tmp_path)
    assert table is not None and table.row_count == 10
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    assert len(lines) == 2 + 10 and len({line.count("|") for line in lines}) == 1
    picture = ElementTree.parse(tmp_path / "comparison.svg").getroot()
    texts = {node.text for node in picture.iter("{http://www.w3.org/2000/svg}text")}
    assert set(recipes) <= texts
    paths = picture.iter("{http://www.w3.org/2000/svg}path")
    curves = [path.get("stroke") for path in paths if path.get("aria-roledescription") == "line mark"]
    assert len(curves) == 10 and len(set(curves)) == 10


def test_one_job_or_none_with_an_evaluation_is_nothing_to_compare(make_job, tmp_path):
    assert write_comparison([make_job(["seed=0"], [0.4])], tmp_path) is None
    assert write_comparison([make_job(["seed=1"], []), make_job(["seed=2"], [])], tmp_path) is None
    assert not (tmp_path / "comparison.svg").exists()
