"""Rewards from other libraries: math-verify's answers, and TRL's own functions, unchanged."""

from __future__ import annotations

import importlib.util

import pytest
from samples import group_of

from rlswitch.config.sections import RewardConfig
from rlswitch.rewards import functions
from rlswitch.rewards.rewards import Rewards
from rlswitch.types import Group

pytestmark = pytest.mark.slow

needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="trl is not installed: requirements/test.txt has it"
)
needs_math = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed"
)


def chat(texts: list[str], **columns) -> Group:
    return group_of(*texts, messages=[{"role": "user", "content": "How much?"}], **columns)


@pytest.fixture
def score():
    """score(entry, group, **settings): the rewards by that one function."""

    def run(entry: str, group: Group, **settings) -> list[float]:
        rewards = Rewards(RewardConfig(functions=[entry], **settings))
        try:
            rewards.check_columns([*group.prompt.columns])
            rewards.score([group], None)
        finally:
            rewards.close()
        assert not group.failed
        return [rollout.reward for rollout in group.rollouts]

    return run


@needs_math
@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("7", ["7", "so it is 7.", r"\boxed{7}", "7.0", "$14/2$"], ["8", "", "seven", "7 or rather 8"]),
        (r"\frac{1}{2}", ["0.5", "1/2", r"$\frac{2}{4}$", r"\boxed{\frac12}"], ["0.25", r"\boxed{\frac{1}"]),
        ("$x^2 - 1$", ["$(x-1)(x+1)$"], ["$x^2$", "$(x - 1"]),
        (72, ["It is 72"], ["71"]),
        # without delimiters, as most datasets have them
        (r"5\sqrt{3}", [r"\boxed{5\sqrt{3}}", r"$\sqrt{75}$"], ["5", r"\boxed{3}"]),
        (r"144\pi", [r"\boxed{144\pi}"], [r"\boxed{144}"]),
        ("2x+1", [r"\boxed{1 + 2x}"], ["2"]),
        ("0.5x", [r"\boxed{\frac{x}{2}}"], ["0.5"]),
        ("1,2,3", [r"\boxed{1,2,3}"], ["1"]),
        ("(1,2)", [r"\boxed{(1, 2)}"], ["1"]),
        (r"3\times 10^4", ["30000"], ["3"]),
        (r"10{,}000", ["10000", "10,000"], ["10"]),
        ("1,234", ["1234"], ["1"]),
        ("it follows that #### 72", ["72"], ["71"]),
        ("3 apples", ["3"], ["4"]),
        (r"50\%", ["50%"], ["5"]),
        # with units
        ("90\u00b0", ["90", r"\boxed{90}"], ["9"]),
        ("\u20ac5", ["5"], ["6"]),
        ("12 N", ["12"], ["13"]),
        ("5 m/s", ["5"], ["6"]),
        ("5 m^2", ["5"], ["25"]),
        ("1e-5", ["1e-5"], ["5"]),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", [r"$\begin{pmatrix} 1 \\ 2 \end{pmatrix}$"], ["1"]),
    ],
)
def test_math_knows_equal_answers(answer, right, wrong):
    texts = [*right, *wrong]
    found = functions.math([None] * len(texts), texts, answer=[answer] * len(texts))
    assert found == [1.0] * len(right) + [0.0] * len(wrong)


@needs_math
def test_math_passes_on_what_has_no_answer():
    assert functions.math([None] * 2, ["7", "7"], answer=[None, "no number at all"]) == [None, None]


@needs_math
def test_math_that_takes_too_long_is_an_error_and_not_a_zero(monkeypatch):
    import math_verify

    def loop(*_: object, **__: object) -> bool:
        while True:
            try:
                pass
            except Exception:  # as math-verify and sympy do
                continue

    monkeypatch.setattr(math_verify, "verify", loop)
    monkeypatch.setattr(functions, "MATH_SECONDS", 0.1)
    (found,) = functions.math([None], ["7"], answer=["7"])
    assert isinstance(found, TimeoutError)


@needs_math
def test_math_in_a_run(score):
    assert score("math", chat([r"\boxed{\frac{1}{3}}", "0.3"], answer="1/3")) == [1.0, 0.0]


@pytest.mark.parametrize("text", ["<a>1</a>\n<b>2</b>", "<a>1</a>"])
def test_format_asks_for_the_whole_completion(score, text):
    group = chat([text, text + "!", "x" + text])
    expected = [1.0, 0.0, 0.0] if "<b>" in text else [0.0] * 3
    assert score("format", group, format_pattern=r"<a>.*</a>\s*<b>.*</b>") == expected


@needs_trl
@needs_math
def test_accuracy_reward_of_trl_works_unchanged(score):
    group = chat([r"My answer is \boxed{\frac{1}{3}}", r"My answer is \boxed{\frac{1}{2}}"], solution="1/3")
    assert score("trl.rewards:accuracy_reward", group) == [1.0, 0.0]
    assert group.rollouts[0].extra["gold_parsed"]


@needs_trl
def test_think_format_reward_of_trl_works_unchanged(score):
    group = chat(["<think>\nreason\n</think>\nanswer", "<think>\nreason\nanswer"])
    assert score("trl.rewards:think_format_reward", group) == [1.0, 0.0]
