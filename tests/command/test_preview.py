"""mode=rewards without an engine: gold answers and tables. tests/engines/test_train.py runs it in full."""

from __future__ import annotations

import io

from rich.console import Console
from rlswitch.recipes.addition.task import build_tokenizer

from rlswitch.command.preview import gold, render
from rlswitch.config.sections import RewardConfig
from rlswitch.rewards.rewards import Rewards
from rlswitch.types import Prompt


def prompt(index: int, **columns) -> Prompt:
    return Prompt(index=index, messages=f"0{index}+01=", token_ids=[1], columns=columns)


def test_gold_answers_are_the_first_answer_column_a_row_has():
    rows = [
        prompt(1, solution="002"),
        prompt(2),
        prompt(3, answer="004", solution="none"),
        prompt(4, answer=None),
    ]
    groups = gold(rows, build_tokenizer())
    assert [(g.prompt.index, g.rollouts[0].text) for g in groups] == [(1, "002"), (3, "004")]
    assert [len(g.rollouts[0].token_ids) for g in groups] == [3, 3]


def test_the_table_says_what_each_function_gives(request):
    rewards = Rewards(RewardConfig(functions=["exact_match", "length"]))
    request.addfinalizer(rewards.close)
    scored = {"gold answers": gold([prompt(1, answer="002")], build_tokenizer()), "the model's": []}
    wrong = gold([prompt(2, answer="009")], build_tokenizer())
    wrong[0].prompt.columns["answer"] = "003"
    scored["the model's"] = wrong
    for groups in scored.values():
        rewards.score(groups, None)
    console = Console(width=120, record=True, file=io.StringIO())
    for part in render(scored, rewards):
        console.print(part)
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["exact_match", "gold", "answers", "1", "0", "1.000", "1.000", "1.000"] in lines
    assert ["length", "the", "model's", "1", "0", "3.000", "3.000", "3.000"] in lines
    assert ["02+01=", "009", "0.000", "3.000"] in lines
