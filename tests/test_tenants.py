"""Models among the rewards: their scores beside the functions', their turn on the device, evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from fakes import FakeTenant
from samples import group_of

from rlswitch.config.sections import RewardConfig
from rlswitch.errors import RewardError
from rlswitch.evaluation import evaluate
from rlswitch.rewards.models.tenant import RewardTenant, ask_in_turn
from rlswitch.rewards.scorer import Scorer
from rlswitch.switch.device import Device
from rlswitch.switch.ledger import Ledger
from rlswitch.switch.switch import Switch
from rlswitch.types import Group

FUNCTIONS = """
def none(prompts, **_):
    return [None] * len(prompts)
def judge(prompts, **_):
    return [5.0] * len(prompts)
"""


def group(*texts: str, answer: str = "7") -> Group:
    return group_of(*texts, index=3, messages="1+6=", answer=answer)


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def switch(tmp_path: Path) -> Switch:
    return Switch(Ledger(Device("cpu"), tmp_path))


@pytest.fixture
def scorer(tmp_path: Path, request):
    """scorer("judge", "none", weights=[...]): tenants, built-in functions, or those of FUNCTIONS."""
    file = tmp_path / "mine.py"
    file.write_text(FUNCTIONS)

    def build(*names: str, **options) -> Scorer:
        entries = [f"{file}:{name[1:]}" if name.startswith(":") else name for name in names]
        made = Scorer(RewardConfig(functions=entries, **options), say=lambda line: None)
        request.addfinalizer(made.close)
        return made

    return build


def asked(scorer: Scorer, switch: Switch, tenants: Sequence[RewardTenant], *groups: Group) -> None:
    pending = scorer.submit(groups)
    ask_in_turn(tenants, pending, switch)
    scorer.collect(pending)


# -- beside the functions ----------------------------------------------------------------------


def test_models_and_functions_are_weighted_and_named_in_the_order_of_the_list(scorer, switch, log):
    scorer = scorer("reward_model", "exact_match", "judge", weights=[10.0, 1.0, 100.0])
    assert scorer.names == ["reward_model", "exact_match", "judge"]
    tenants = [
        FakeTenant("reward model", log, lambda t: 0.5),
        FakeTenant("judge", log, lambda t: float(t == "8")),
    ]
    groups = [group("7", "8")]
    asked(scorer, switch, tenants, *groups)
    first, second = groups[0].rollouts
    assert list(first.rewards.items()) == [("reward_model", 0.5), ("exact_match", 1.0), ("judge", 0.0)]
    assert (first.reward, second.reward) == (6.0, 105.0)
    assert second.extra == {"reward_model": "8", "judge": "8"}
    metrics = scorer.metrics(groups)
    assert metrics["reward/judge/mean"] == 0.5 and metrics["reward/reward_model/error_rate"] == 0.0


def test_a_model_without_an_answer_is_an_error_like_a_functions(scorer, switch, log):
    scorer = scorer("judge", "exact_match", max_error_rate=0.5)
    scored = group("7", "8")
    tenants = [FakeTenant("judge", log, lambda t: None if t == "8" else 1.0)]
    asked(scorer, switch, tenants, scored)
    assert [it.text for it in scored.rollouts] == ["7"]
    assert [it.errors for it in scored.failed] == [{"judge": "fell silent"}]
    assert scorer.metrics([scored])["reward/judge/error_rate"] == 0.5
    with pytest.raises(
        RewardError, match=r"reward 'judge' fell silent for row 3, sample 1 \(prompt '1\+6='\)"
    ):
        asked(scorer, switch, tenants, group("7", "8", "8", "8"))


def test_models_alone_need_no_worker(scorer, switch, log):
    before = set(psutil.Process().children())
    scorer = scorer("judge")
    assert (scorer.names, scorer.judged_by) == (["judge"], "judge")
    assert set(psutil.Process().children()) <= before
    scorer.check([group().prompt])
    scored = group("7")
    asked(scorer, switch, [FakeTenant("judge", log, lambda t: 0.25)], scored)
    assert scored.rollouts[0].reward == 0.25


def test_a_function_of_the_same_name_takes_another(scorer):
    assert scorer(":judge", "judge").names == ["judge_2", "judge"]
    assert scorer(":judge", "exact_match").names == ["judge", "exact_match"]


def test_where_no_function_applies_a_model_may(scorer, switch, log):
    scorer, scored = scorer(":none", "judge"), group("7", "8")
    asked(scorer, switch, [FakeTenant("judge", log, lambda t: 1.0)], scored)
    assert [it.rewards for it in scored.rollouts] == [{"judge": 1.0}] * 2


def test_where_nothing_applies_it_is_an_error_once_all_have_been_asked(scorer):
    with pytest.raises(RewardError, match="returned None, as every function did"):
        scorer(":none").score([group("7")])
    unasked = group("7")
    scorer(":none", "judge").score([unasked])
    assert len(unasked.rollouts) == 1


# -- in turn on the device ---------------------------------------------------------------------


def test_each_has_the_device_to_itself_while_it_scores(scorer, switch, log, tmp_path):
    scorer = scorer("judge", "reward_model")
    switch.holder = FakeTenant("engine", log, lambda t: None)
    tenants = [FakeTenant("judge", log, lambda t: 1.0), FakeTenant("reward model", log, lambda t: 1.0)]
    asked(scorer, switch, tenants, group("7", "8"))
    assert log == [
        "engine releases",
        "judge acquires",
        "judge scores 2",
        "judge releases",
        "reward model acquires",
        "reward model scores 2",
    ]
    assert switch.holder is tenants[1]


# -- evaluation --------------------------------------------------------------------------------


@pytest.fixture
def session(make_run, switch, log):
    """session(scorer, tenants): what evaluate() looks at; the engine answers 7 greedily, then 7 and 8."""

    def build(scorer: Scorer, tenants: Sequence[RewardTenant] = ()):
        def generate(prompts, sampling):
            log.append(f"engine generates at {sampling.temperature:g}")
            return [group(*("7", "8")[: sampling.num_samples]), group("8", answer="9")]

        engine = SimpleNamespace(
            version=0, generate=generate, forget_prefixes=lambda: log.append("engine forgets")
        )
        return SimpleNamespace(
            run=make_run(evaluation={"num_samples": 2}),
            engine=engine,
            scorer=scorer,
            tenants=tenants,
            held_out=[],
            switch=switch,
            ledger=switch.ledger,
        )

    return build


def test_a_function_says_what_is_right_and_no_model_is_asked(scorer, session, log):
    tenants = [FakeTenant("judge", log, lambda t: 1.0)]
    metrics = evaluate(session(scorer("judge", "exact_match"), tenants))
    assert metrics == {"val/addition/acc": 0.5, "val/addition/pass@2": 0.5}
    assert log == ["engine generates at 0", "engine generates at 1", "engine forgets"]


def test_without_a_function_the_first_model_is_asked_once_the_engine_is_done(scorer, session, log):
    tenants = [
        FakeTenant("reward model", log, lambda t: float(t == "8")),
        FakeTenant("judge", log, lambda t: 1.0),
    ]
    metrics = evaluate(session(scorer("reward_model", "judge"), tenants))
    assert metrics == {"val/addition/acc": 0.5, "val/addition/pass@2": 1.0}
    assert log[2:4] == ["engine forgets", "reward model acquires"]
    assert not [line for line in log if line.startswith("judge")]


def test_rows_that_no_function_applies_to_do_not_count(scorer, session):
    metrics = evaluate(session(scorer(":none", "judge"), [FakeTenant("judge", [], lambda t: 1.0)]))
    assert math.isnan(metrics["val/addition/acc"])


def test_a_row_that_the_judging_function_does_not_apply_to_is_not_wrong(scorer, session):
    some = session(scorer("exact_match", "length"))
    some.engine.generate = lambda *_: [group("7"), group("8", answer=None)]
    assert evaluate(some)["val/addition/acc"] == 1.0


# -- the clock ---------------------------------------------------------------------------------


def test_a_hand_over_inside_of_work_is_counted_as_switching_only(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("rlswitch.switch.ledger.time", SimpleNamespace(monotonic=lambda: now[0]))
    ledger, heard = Ledger(Device("cpu"), tmp_path), []
    ledger.on_phase = heard.append
    with ledger.work("reward"):
        now[0] += 1.0
        with ledger.between("rollout engine", "judge"), ledger.phase("sleep"):
            now[0] += 4.0
        now[0] += 2.0
    metrics = ledger.step_metrics()
    assert (metrics["timing_s/reward"], metrics["timing_s/switch"]) == (3.0, 4.0)
    assert metrics["timing_s/step"] == 7.0
    assert heard == ["reward", "switch", "reward"]
    (row,) = [json.loads(line) for line in (tmp_path / "switch.jsonl").open()]
    assert (row["from"], row["to"]) == ("rollout engine", "judge")
