"""The judge without an engine: its prompts, how replies are parsed, and retries."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlswitch.recipes.addition.task import build_tokenizer
from samples import group_of

from rlswitch.config.sections import JudgeConfig
from rlswitch.rewards.models.judge import Judge
from rlswitch.rewards.models.template import (
    blank_problems,
    blanks,
    fill_in,
    pattern_problems,
    plain,
    read_score,
    template_problems,
)
from rlswitch.types import Group, Rollout

# -- the template ------------------------------------------------------------------------------


def test_blanks_are_filled_in_with_prompt_completion_and_columns():
    asked = fill_in("{prompt}|{completion}|{answer}|{tests}", "1+1=", "3", {"answer": 2, "tests": [1, None]})
    assert asked == "1+1=|3|2|[1, None]"


@given(prompt=st.text(), completion=st.text())
def test_whatever_is_filled_in_stays_as_it_is(prompt: str, completion: str):
    assert fill_in("{{{prompt}}}{completion}", prompt, completion, {}) == f"{{{prompt}}}{completion}"


def test_a_column_called_prompt_does_not_hide_the_prompt():
    assert fill_in("{prompt}{completion}", "a", "b", {"prompt": "x", "completion": "y"}) == "ab"


def test_of_a_chat_the_only_message_or_all_with_their_roles():
    user, system = {"role": "user", "content": "1+1="}, {"role": "system", "content": "add"}
    assert plain("1+1=") == plain([user]) == "1+1="
    assert plain([system, user]) == "system: add\nuser: 1+1="


@pytest.mark.parametrize("template", ["{}", "{completion", "{completion.real}", "{completion!r}", "{a b}"])
def test_braces_hold_names_only(template: str):
    with pytest.raises(ValueError):
        blanks(template)
    (line,) = template_problems(template)
    assert line.startswith("judge.prompt = ") and "cannot be filled in" in line


def test_a_template_has_to_show_the_completion():
    (line,) = template_problems("{prompt} {answer} {{completion}}")
    assert "has no {completion}" in line
    assert not list(template_problems("{{}} {completion} {answer}"))


def test_an_unknown_blank_names_the_columns_and_the_nearest():
    assert not list(blank_problems("{prompt}{completion}{answer}", ["answer"]))
    assert list(blank_problems("{completion}{anser}{zzz}{zzz}", ["answer"])) == [
        "judge.prompt: {anser} is no column of the dataset, so it could not be filled in; there is prompt,"
        " completion, answer; did you mean 'answer'?",
        "judge.prompt: {zzz} is no column of the dataset, so it could not be filled in; there is prompt,"
        " completion, answer",
    ]


# -- the reply ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "pattern", "scale", "score"),
    [
        ("1", r"\b([01])\b", 1.0, 1.0),
        ("0.", r"\b([01])\b", 1.0, 0.0),
        ("10", r"\b([01])\b", 1.0, None),
        ("first 3/10, then again: 7/10", r"(\d+)/10", 10.0, 0.7),
        ("-2.5", r"(-?\d+\.\d+)", 1.0, -2.5),
        ("yes", r"(yes|no)", 1.0, None),
        ("a", r"(b)?", 1.0, None),
        ("inf", r"(inf)", 1.0, None),
        ("", r"(\d)", 1.0, None),
    ],
)
def test_the_last_match_is_the_score(reply, pattern, scale, score):
    assert read_score(reply, pattern, scale) == score


@pytest.mark.parametrize(
    ("pattern", "says"),
    [("(", "no regular expression"), ("1", "has 0 groups"), ("(1)(2)", "has 2 groups")],
)
def test_a_pattern_has_one_group(pattern: str, says: str):
    (line,) = pattern_problems(pattern)
    assert line.startswith(f"judge.pattern = {pattern}: ") and says in line
    assert not list(pattern_problems(r"(?:a|b)(\d)"))


# -- asking ------------------------------------------------------------------------------------


class Replies:
    """A fake judge engine: replies by question, one per attempt."""

    def __init__(self, **replies: list[str]):
        self.tokenizer = build_tokenizer()
        self.replies = {question.strip("_"): list(texts) for question, texts in replies.items()}
        self.calls: list[tuple[list[str], float, int]] = []

    def generate(self, prompts, sampling):
        self.calls.append(([it.messages for it in prompts], sampling.temperature, sampling.seed))
        return [self._group(prompt, self.replies[prompt.messages].pop(0)) for prompt in prompts]

    @staticmethod
    def _group(prompt, text: str):
        return Group(prompt=prompt, rollouts=[SimpleNamespace(text=text)])


def rollouts(*texts: str) -> list[Rollout]:
    return group_of(*texts, index=7, version=3).rollouts


def judge(engine: Replies, max_model_len: int = 64, **settings) -> Judge:
    config = JudgeConfig(prompt="{completion}", pattern="([01])", max_new_tokens=4, **settings)
    return Judge(config, engine, max_model_len)


def test_every_rollout_gets_its_score_and_equal_ones_are_asked_once():
    engine = Replies(_12=["1"], _34=["0"])
    scores = judge(engine).score(rollouts("12", "34", "12", "12"))
    assert [it.value for it in scores] == [1.0, 0.0, 1.0, 1.0]
    assert [it.extra["judge"] for it in scores] == ["1", "0", "1", "1"]
    assert engine.calls == [(["12", "34"], 0.0, 0)]


def test_only_a_reply_without_a_score_is_asked_for_again_with_another_seed():
    engine = Replies(_12=["1"], _34=["=", "+", "0"], _56=["", "1"])
    scores = judge(engine).score(rollouts("12", "34", "56"))
    assert [it.value for it in scores] == [1.0, 0.0, 1.0]
    asked, temperatures, seeds = zip(*engine.calls, strict=True)
    assert asked == (["12", "34", "56"], ["34", "56"], ["34"])
    assert temperatures[0] == 0 and min(temperatures[1:]) > 0
    assert len(set(seeds)) == 3


@pytest.mark.parametrize("retries", [0, 2])
def test_after_the_last_retry_it_is_an_error_and_never_a_number(retries: int):
    engine = Replies(_12=["="] * retries + ["last"], _34=["0"])
    scores = judge(engine, retries=retries).score(rollouts("12", "34"))
    assert [it.value for it in scores] == [None, 0.0]
    times = "in its reply" if retries == 0 else "in 3 replies"
    assert scores[0].error == f"gave no score {times}: 'last'"
    assert len(engine.calls) == 1 + retries


def test_the_score_is_divided_by_the_scale():
    assert judge(Replies(_12=["1"]), scale=4.0).score(rollouts("12"))[0].value == 0.25


def test_a_question_that_has_no_room_is_not_cut_but_an_error():
    engine = Replies(_12=["1"])
    scores = judge(engine, max_model_len=10).score(rollouts("123456", "12"))
    assert [it.value for it in scores] == [None, 1.0]
    assert scores[0].error == "needs a question of 7 tokens, there is room for 6"


def test_nothing_is_asked_about_nothing():
    engine = Replies()
    assert judge(engine).score([]) == [] and engine.calls == []
