"""Rewards: TRL's signature, the weighted sum, and how functions are loaded."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlswitch.config.sections import RewardConfig
from rlswitch.errors import ConfigError
from rlswitch.rewards.functions import exact_match
from rlswitch.rewards.metrics import reward_metrics
from rlswitch.rewards.rewards import Rewards
from rlswitch.types import Group, Prompt, Rollout


def group(index: int, texts: list[str], messages=None, finish: str = "stop", **columns) -> Group:
    prompt = Prompt(
        index=index,
        messages=f"prompt {index}" if messages is None else messages,
        token_ids=[1] * (index + 1),
        columns={"answer": "7", **columns},
    )
    rollouts = [
        Rollout(
            prompt=prompt,
            sample=sample,
            token_ids=[5] * len(text),
            logprobs=[0.0] * len(text),
            text=text,
            finish_reason=finish,
            policy_version=0,
        )
        for sample, text in enumerate(texts)
    ]
    return Group(prompt=prompt, rollouts=rollouts)


@pytest.fixture
def rewards(tmp_path: Path):
    """rewards(source, *names, **settings): the functions of that names in a module of that source."""
    made: list[Rewards] = []

    def build(source: str, *names: str, **options) -> Rewards:
        file = tmp_path / f"mine{len(made)}.py"
        file.write_text(source)
        entries = [name if name in ("exact_match", "length") else f"{file}:{name}" for name in names]
        made.append(Rewards(RewardConfig(functions=entries, **options)))
        return made[-1]

    yield build
    for one in made:
        one.close()


# ---- arguments of a function


RECORD = """
import json, os
def record(log_extra, **arguments):
    with open("CALLS", "a") as file:
        file.write(json.dumps(arguments) + "\\n")
    return [0.0] * len(arguments["prompts"])
"""


@pytest.fixture
def recording(rewards, tmp_path: Path):
    """A Rewards whose function notes down what it is called with, and the notes."""

    def calls() -> list[dict]:
        return [json.loads(line) for line in (tmp_path / "CALLS").read_text().splitlines()]

    return rewards(RECORD.replace("CALLS", str(tmp_path / "CALLS")), "record"), calls


def test_text_prompts_and_completions_are_strings(recording):
    rewards, calls = recording
    rewards.score([group(0, ["a", "bc"], level=3), group(1, ["d"], level=4)], None)
    assert calls() == [
        {
            "prompts": ["prompt 0", "prompt 0", "prompt 1"],
            "completions": ["a", "bc", "d"],
            "completion_ids": [[5], [5, 5], [5]],
            "answer": ["7", "7", "7"],
            "level": [3, 3, 4],
        }
    ]


def test_chat_prompts_are_messages_and_completions_one_assistant_message(recording):
    rewards, calls = recording
    messages = [{"role": "user", "content": "1+6="}]
    rewards.score([group(0, ["7"], messages=messages)], None)
    assert calls()[0]["prompts"] == [messages]
    assert calls()[0]["completions"] == [[{"role": "assistant", "content": "7"}]]


def test_columns_with_the_name_of_prompt_or_completion_are_left_out_as_in_trl(recording):
    rewards, calls = recording
    rewards.score([group(0, ["7"], prompt="other", completion="reference")], None)
    assert set(calls()[0]) == {"prompts", "completions", "completion_ids", "answer"}


def test_a_function_cannot_change_the_dataset(rewards):
    rewards = rewards(
        """
def spoil(prompts, completions, tests, **columns):
    prompts[0][0]["content"] = "spoilt"
    tests[0].clear()
    columns["completion_ids"][0].clear()
    return [1.0] * len(prompts)
""",
        "spoil",
    )
    spoilt = group(0, ["7"], messages=[{"role": "user", "content": "1+6="}], tests=[1, 2])
    rewards.score([spoilt], None)
    assert spoilt.prompt.messages == [{"role": "user", "content": "1+6="}]
    assert spoilt.prompt.columns["tests"] == [1, 2]
    assert spoilt.rollouts[0].token_ids == [5]


# ---- scores


@pytest.fixture(scope="module")
def given_by_column(tmp_path_factory: pytest.TempPathFactory):
    """A Rewards that returns the columns `first` and `second`, with weights 2 and -0.5."""
    file = tmp_path_factory.mktemp("columns") / "columns.py"
    file.write_text(
        "def one(first, **c): return first[0][:len(first)]\n"
        "def two(second, **c): return second[0][:len(second)]\n"
    )
    rewards = Rewards(RewardConfig(functions=[f"{file}:one", f"{file}:two"], weights=[2.0, -0.5]))
    yield rewards
    rewards.close()


@settings(deadline=None, max_examples=50)
@given(scores=st.lists(st.tuples(*[st.floats(-1e6, 1e6)] * 2), min_size=1, max_size=12))
def test_reward_is_the_weighted_sum(given_by_column, scores):
    first, second = (list(column) for column in zip(*scores, strict=True))
    scored = group(0, ["x"] * len(scores), first=first, second=second)
    given_by_column.score([scored], None)
    for rollout, (one, two) in zip(scored.rollouts, scores, strict=True):
        assert rollout.rewards == {"one": one, "two": two}
        assert rollout.reward == pytest.approx(2.0 * one - 0.5 * two, rel=1e-9, abs=1e-6)


def test_none_is_left_out_of_the_sum_the_rewards_and_the_mean(rewards):
    source = "def some(prompts, **columns): return [None, 4.0]"
    rewards = rewards(source, "exact_match", "some", weights=[1.0, 0.5])
    scored = group(0, ["7", "8"])
    rewards.score([scored], None)
    first, second = scored.rollouts
    assert (first.reward, first.rewards) == (1.0, {"exact_match": 1.0})
    assert (second.reward, second.rewards) == (2.0, {"exact_match": 0.0, "some": 4.0})
    metrics = reward_metrics([scored], rewards.names)
    assert metrics["reward/some/mean"] == 4.0
    assert metrics["reward/exact_match/mean"] == 0.5


def test_numpy_torch_bool_and_generators_are_numbers(rewards):
    rewards = rewards(
        """
import numpy, torch
def array(prompts, **columns): return numpy.ones(len(prompts), dtype=numpy.float32)
def tensor(prompts, **columns): return torch.ones(len(prompts))
def boolean(prompts, **columns): return (True for _ in prompts)
""",
        *("array", "tensor", "boolean"),
    )
    scored = group(0, ["7", "8"])
    rewards.score([scored], None)
    assert all(type(score) is float for r in scored.rollouts for score in r.rewards.values())
    assert [rollout.reward for rollout in scored.rollouts] == [3.0, 3.0]


def test_async_functions_run_together_and_keep_their_order_and_loop(rewards):
    rewards = rewards(
        """
import asyncio
met, loops = asyncio.Event(), []
async def first(prompts, **columns):
    loops.append(asyncio.get_running_loop())
    assert all(loop is loops[0] for loop in loops)
    await asyncio.wait_for(met.wait(), 60)      # set by `second` only
    return [1.0] * len(prompts)
async def second(prompts, **columns):
    met.set()
    return [2.0] * len(prompts)
class Judge:
    async def __call__(self, prompts, **columns):
        await asyncio.sleep(0)
        return [3.0] * len(prompts)
judge = Judge()
def own_loop(prompts, **columns):
    return asyncio.run(Judge()(prompts))
""",
        *("first", "second", "judge", "length", "own_loop"),
    )
    scored = group(0, ["7"])
    rewards.score([scored], None)
    rewards.score([scored], None)
    expected = {"first": 1.0, "second": 2.0, "judge": 3.0, "length": 1.0, "own_loop": 3.0}
    assert list(scored.rollouts[0].rewards.items()) == list(expected.items())


def test_log_extra_of_trl_goes_with_the_rollouts(rewards):
    source = """
def logs(prompts, completions, log_extra=None, **columns):
    log_extra("seen", [text * 2 for text in completions])
    return [1.0] * len(prompts)
def narrow(prompts, completions, completion_ids, answer):
    return [1.0] * len(prompts)
"""
    rewards = rewards(source, "logs", "narrow")
    scored = group(0, ["7", "8"])
    rewards.score([scored], None)
    assert [rollout.extra for rollout in scored.rollouts] == [{"seen": "77"}, {"seen": "88"}]


def test_several_workers_get_whole_groups_each(rewards, tmp_path):
    met = tmp_path / "met"
    met.mkdir()
    source = f"""
import os, time
def process(prompts, **columns):
    open(f"{met}/{{os.getpid()}}", "w").close()
    while len(os.listdir("{met}")) < 2:      # the other worker is at it meanwhile
        time.sleep(0.01)
    return [os.getpid()] * len(prompts)
def together(prompts, **columns): return [len(prompts)] * len(prompts)
"""
    groups = [group(index, ["a", "b", "c"]) for index in range(5)]
    rewards = rewards(source, "process", "together", workers=2)
    rewards.score(groups, None)
    assert [rollout.rewards["together"] for g in groups for rollout in g.rollouts] == [9] * 9 + [6] * 6
    assert len({rollout.rewards["process"] for g in groups for rollout in g.rollouts}) == 2


def test_scores_are_awaited_where_they_are_collected(rewards):
    source = "def one(prompts, **columns): return [1.0] * len(prompts)"
    rewards = rewards(source, "one")
    first, second = group(0, ["7"]), group(1, ["8", "9"])
    pending = [rewards.submit([first]), rewards.submit([second])]
    assert first.rollouts[0].rewards == {}
    for one in pending:
        rewards.collect_correctness(one, None)
    assert [rollout.reward for g in (first, second) for rollout in g.rollouts] == [1.0] * 3


def test_an_overlong_completion_loses_reward_and_its_rewards_stay_as_they_were(tmp_path, request):
    config = RewardConfig(functions=["length"], overlong_buffer=4)
    rewards = Rewards(config, max_new_tokens=10)
    request.addfinalizer(rewards.close)
    scored = group(0, ["1" * 6, "1" * 8, "1" * 10])
    rewards.score([scored], None)
    assert [rollout.reward for rollout in scored.rollouts] == [6.0, 7.5, 9.0]
    assert [rollout.rewards for rollout in scored.rollouts] == [{"length": n} for n in (6.0, 8.0, 10.0)]


# ---- loading functions


def test_functions_come_from_modules_files_and_the_built_in_table(tmp_path, monkeypatch, request):
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "mine.py").write_text("def exact_match(prompts, **c): return [2.0] * len(prompts)")
    monkeypatch.syspath_prepend(tmp_path)
    entries = ["exact_match", "my_package.mine:exact_match", f"{package / 'mine.py'}:exact_match"]
    rewards = Rewards(RewardConfig(functions=entries, weights=[1.0, 10.0, 100.0]))
    request.addfinalizer(rewards.close)
    assert rewards.names == ["exact_match", "exact_match_2", "exact_match_3"]
    scored = group(0, ["7"])
    rewards.score([scored], None)
    assert scored.rollouts[0].reward == 221.0


def test_names_stay_unique_when_a_suffix_is_taken(rewards):
    source = "def a(**c): ...\ndef a_2(**c): ...\n"
    assert rewards(source, "a_2", "a", "a").names == ["a_2", "a", "a_3"]


def test_a_file_runs_once_and_may_define_dataclasses(rewards):
    source = """
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class State:
    calls: int = 0
state = State()
def count(prompts, **columns):
    state.calls += 1
    return [state.calls] * len(prompts)
"""
    rewards = rewards(source, "count", "count")
    scored = group(0, ["7"])
    rewards.score([scored], None)
    assert scored.rollouts[0].rewards == {"count": 1.0, "count_2": 2.0}


def test_check_tells_a_missing_column_before_anything_runs(rewards):
    source = """
def needs(prompts, completions, solution, **columns): ...
def closed(prompts, completions, completion_ids, answer): ...
def narrow(completions): ...
"""
    rewards = rewards(source, "exact_match", "needs", "closed", "narrow", "length")
    prompt = group(0, ["7"]).prompt
    with pytest.raises(ConfigError) as caught:
        rewards.check_columns([*prompt.columns])
    needs, narrow = caught.value.problems
    assert "missing a required argument: 'solution'" in needs and "answer" in needs
    assert ":narrow: cannot be called" in narrow
    prompt.columns["solution"] = "7"
    prompt.columns["completions"] = "x"
    with pytest.raises(ConfigError) as caught:
        rewards.check_columns([*prompt.columns])
    assert "column 'completions'" in caught.value.problems[0]
    assert [":closed:" in line for line in caught.value.problems] == [False, True, False]


# ---- the built-in functions and the metrics


def test_exact_match_reads_text_and_chat_and_passes_on_a_missing_answer():
    chat = [{"role": "assistant", "content": "\t 7 "}]
    answers = ["7", " 7\n", 7, "77", None]
    completions = [" 7", chat, "7", "7", "7"]
    assert exact_match([None] * 5, completions, answer=answers) == [1.0, 1.0, 1.0, 0.0, None]


def test_metrics_by_hand(rewards):
    rewards = rewards("", "exact_match", "length", weights=[1.0, -0.5])
    groups = [group(0, ["7", "7"]), group(2, ["7", "1234"], finish="length")]
    rewards.score(groups, None)
    assert reward_metrics(groups, rewards.names) == pytest.approx(
        {
            "reward/mean": (0.5 + 0.5 + 0.5 - 2.0) / 4,
            "reward/std": math.sqrt(3 * 0.625**2 + 1.875**2) / 2,
            "reward/frac_zero_std": 0.5,
            "reward/error_rate": 0.0,
            "reward/exact_match/mean": 0.75,
            "reward/exact_match/std": math.sqrt(3) / 4,
            "reward/exact_match/error_rate": 0.0,
            "reward/length/mean": 7 / 4,
            "reward/length/std": math.sqrt(3 * 0.75**2 + 2.25**2) / 2,
            "reward/length/error_rate": 0.0,
            "response_length/mean": 7 / 4,
            "response_length/max": 4.0,
            "response_length/min": 1.0,
            "response_length/clip_ratio": 0.5,
            "prompt_length/mean": 2.0,
            "prompt_length/max": 3.0,
        }
    )
