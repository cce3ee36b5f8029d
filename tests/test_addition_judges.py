"""The built-in judge and reward model: what they are taught. How right they are is seen in tests/engine."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from rlswitch.compose import Source, compose_run
from rlswitch.rewards.template import fill_in, read_score
from rlswitch.tasks import addition, addition_judge, addition_reward_model
from rlswitch.tasks.addition_judge import IGNORED, answer, answered, question, reply

CASES = [((7, 45), "052"), ((7, 45), "042"), ((99, 99), ""), ((0, 0), "000+0000")]


@pytest.fixture(params=[addition_judge, addition_reward_model], ids=["judge", "reward model"])
def task(request, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Either module, made in three small steps and cached in a directory of its own."""
    monkeypatch.setattr(request.param, "STEPS", 3)
    monkeypatch.setattr(request.param, "BATCH", 4)
    monkeypatch.setenv("RLSWITCH_CACHE", str(tmp_path / "cache"))
    return request.param


def test_held_out_problems_are_never_shown():
    held_out = set(addition.split()[1])
    shown = {problem for cases in answered(0, 200, 64) for problem, _ in cases}
    assert len(shown) > 6000 and not shown & held_out


def test_about_half_of_the_answers_are_wrong_and_most_of_them_nearly_right():
    generator, kinds = random.Random(0), Counter()
    for _ in range(2000):
        a, b = generator.randrange(100), generator.randrange(100)
        given, right = answer(a, b, generator), f"{a + b:03d}"
        kinds["right"] += given == right
        kinds["near"] += len(given) == 3 and sum(x != y for x, y in zip(given, right, strict=True)) == 1
    assert 0.4 < kinds["right"] / 2000 < 0.6
    assert kinds["near"] > 600


def test_the_recipe_asks_the_judge_as_it_was_taught_and_reads_its_replies():
    judge = compose_run(["recipe=judge"], Source.default()).judge
    for problem, given in CASES:
        prompt = f"{problem[0]:02d}+{problem[1]:02d}="
        asked = fill_in(judge.prompt, prompt, given, {"answer": "never shown"})
        assert asked == question(problem, given)
        said = reply(problem, given)
        assert len(said) < judge.max_new_tokens
        assert read_score(said, judge.pattern, judge.scale) == float(given == f"{sum(problem):03d}")


def test_the_judge_is_to_predict_the_sum_and_its_own_reply_only():
    tokens, labels = addition_judge.to_tensors(CASES)
    assert tokens.shape == labels.shape
    names = [*addition.VOCABULARY, "."]
    texts = ["".join(names[i if i != IGNORED else -1] for i in row) for row in labels.tolist()]
    assert texts[1] == ".....2052.052=0<eos>" + "." * (tokens.shape[1] - 16)
    assert texts[2] == ".....81198=0<eos>" + "." * (tokens.shape[1] - 13)


def test_the_reward_model_is_told_where_an_answer_goes_wrong():
    tokens, marks, _ = addition_reward_model.to_tensors(CASES)
    yes, no = addition_reward_model.RIGHT, addition_reward_model.WRONG
    rows = [[round(mark, 3) for mark in row if mark >= 0] for row in marks.tolist()]
    assert rows == [[yes] * 4, [yes, no, no, no], [no], [yes] * 3 + [no] * 6]
    ends = (tokens == addition.build_tokenizer().eos_token_id).int().argmax(-1)
    assert all(marks[i, end] >= 0 and (marks[i, end + 1 :] < 0).all() for i, end in enumerate(ends))


def test_what_is_made_depends_on_the_seed_and_on_nothing_else(task):
    def parameters(seed: int) -> list[torch.Tensor]:
        return [p.detach() for p in task.learn(seed, show=False).parameters()]

    first, again, other = parameters(0), parameters(0), parameters(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_it_is_made_once_and_said_what_for(task):
    said: list[str] = []
    path = task.ensure_model(0, said.append)
    assert task.ensure_model(0, said.append) == path
    assert len(said) == 1 and "about a minute" in said[0]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in path.iterdir()}
