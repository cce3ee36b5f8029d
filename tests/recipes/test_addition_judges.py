"""The built-in judge and reward model: their training data, and their accuracy after part of the training."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from rlswitch.recipes.addition import judge as addition_judge
from rlswitch.recipes.addition import policy as addition_policy
from rlswitch.recipes.addition import reward_model as addition_reward_model
from rlswitch.recipes.addition import task as addition
from rlswitch.recipes.addition.judge import IGNORED, Case, question, reply, sample_answer, sample_cases
from transformers import Qwen3ForSequenceClassification

from rlswitch.command.compose import Source, compose_run
from rlswitch.rewards.models.template import fill_in, read_score

CASES = [((7, 45), "052"), ((7, 45), "042"), ((99, 99), ""), ((0, 0), "000+0000")]


def test_held_out_problems_are_never_shown():
    held_out = set(addition.split()[1])
    shown = {problem for cases in sample_cases(0, 200, 64) for problem, _ in cases}
    assert len(shown) > 6000 and not shown & held_out


def test_about_half_of_the_answers_are_wrong_and_most_of_them_nearly_right():
    generator, kinds = random.Random(0), Counter()
    for _ in range(2000):
        a, b = generator.randrange(100), generator.randrange(100)
        given, right = sample_answer(a, b, generator), f"{a + b:03d}"
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


def test_the_judge_is_to_predict_its_own_reply_only():
    tokens, labels = addition_judge.to_tensors(CASES)
    assert tokens.shape == labels.shape
    names = [*addition.VOCABULARY, "."]
    texts = ["".join(names[i if i != IGNORED else -1] for i in row) for row in labels.tolist()]
    assert texts[1].strip(".") == "052=100<eos>" and texts[1].index("0") == len("042=07+45=")
    assert texts[2].strip(".") == "198=000<eos>" and texts[2].index("1") == len("=99+99=")


def test_the_reward_model_is_told_which_digits_are_right():
    tokens, marks, sums = addition_reward_model.to_tensors(CASES)
    yes, no = addition_reward_model.RIGHT, addition_reward_model.WRONG
    rows = [[round(mark, 3) for mark in row if mark >= 0] for row in marks.tolist()]
    assert rows == [[yes] * 4, [yes, no, yes, no], [no], [yes] * 3 + [no] * 6]
    ends = (tokens == addition.build_tokenizer().eos_token_id).int().argmax(-1)
    assert all(marks[i, end] >= 0 and (marks[i, end + 1 :] < 0).all() for i, end in enumerate(ends))
    assert [[i for i in row if i != IGNORED] for row in sums.tolist()][:3] == [[2, 0, 5, 2]] * 2 + [
        [8, 1, 9, 8]
    ]


def test_the_same_comes_of_the_same_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RLSWITCH_CACHE", str(tmp_path))
    for module in (addition_policy, addition_judge, addition_reward_model):
        monkeypatch.setattr(module, "STEPS", 3)
        monkeypatch.setattr(module, "BATCH", 4)
    policy = addition_policy.ensure_model(0, print)
    for train in (lambda seed: addition_judge.train_judge(policy, seed, show=False), quiet_reward_model):
        first, again, other = (list(train(seed).parameters()) for seed in (0, 0, 1))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.fixture(scope="module")
def pupils_answers() -> tuple[list[Case], list[bool]]:
    """Careless answers to the held-out problems, and which are right: a little more than half."""
    generator = random.Random(0)
    cases = [(problem, addition.demonstrate(*problem, generator)) for problem in addition.split()[1]]
    return cases, [given == f"{sum(problem):03d}" for problem, given in cases]


A_LITTLE_WISE = 0.7
"""A constant verdict agrees in 0.57 of the cases; six seeds reached 0.78 to 0.90."""


def agreement(verdicts: list[bool], right: list[bool]) -> float:
    return sum(ours == theirs for ours, theirs in zip(verdicts, right, strict=True)) / len(right)


@pytest.mark.slow
def test_after_a_quarter_of_its_course_the_judge_is_right_about_problems_it_never_saw(
    pupils_answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RLSWITCH_CACHE", str(tmp_path))
    monkeypatch.setattr(addition_policy, "STEPS", 150)
    monkeypatch.setattr(addition_judge, "STEPS", 150)
    judge = addition_judge.train_judge(addition_policy.ensure_model(0, print), seed=0, show=False).eval()
    (cases, right), tokenizer = pupils_answers, addition.build_tokenizer()
    asked = torch.tensor([tokenizer(question(*case)).input_ids for case in cases])
    told = judge.generate(
        input_ids=asked,
        attention_mask=torch.ones_like(asked),
        do_sample=False,
        max_new_tokens=8,
        pad_token_id=tokenizer.pad_token_id,
    )
    settings = compose_run(["recipe=judge"], Source.default()).judge
    replies = tokenizer.batch_decode(told[:, asked.shape[1] :], skip_special_tokens=True)
    scores = [read_score(text, settings.pattern, settings.scale) for text in replies]
    assert None not in scores
    assert agreement([score == 1.0 for score in scores], right) >= A_LITTLE_WISE


@pytest.mark.slow
def test_after_a_quarter_of_its_course_the_reward_model_is_right_about_problems_it_never_saw(
    pupils_answers, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(addition_reward_model, "STEPS", 240)
    (cases, right), model = pupils_answers, quiet_reward_model(0)
    tokens, _, _ = addition_reward_model.to_tensors(cases)
    with torch.no_grad():
        scores = model(input_ids=tokens, attention_mask=tokens != model.config.pad_token_id).logits[:, 0]
    assert agreement((scores > 0).tolist(), right) >= A_LITTLE_WISE


def quiet_reward_model(seed: int) -> Qwen3ForSequenceClassification:
    return addition_reward_model.train_reward_model(seed, show=False)


@pytest.mark.parametrize("task", [addition_judge, addition_reward_model], ids=["judge", "reward model"])
def test_it_is_made_once_and_cached(task, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("RLSWITCH_CACHE", str(tmp_path / "cache"))
    for module in (addition_policy, task):
        monkeypatch.setattr(module, "STEPS", 3)
        monkeypatch.setattr(module, "BATCH", 4)
    said: list[str] = []
    path = task.ensure_model(0, said.append)
    assert task.ensure_model(0, said.append) == path
    assert len([line for line in said if path.name.split("-seed")[0][:-13] in line]) == 1
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in path.iterdir()}
