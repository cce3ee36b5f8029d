"""Reward models and judges: their scores next to the functions', their turn on the device, evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import psutil
import pytest
from fakes import FakeTenant
from rlswitch.recipes.addition.task import build_tokenizer
from samples import group_of

from rlswitch.build import start_tenants
from rlswitch.command.checks import tenant_problems
from rlswitch.config.sections import TENANTS, RewardConfig, TenantConfig
from rlswitch.errors import ConfigError, RewardError
from rlswitch.evaluation import evaluate
from rlswitch.rewards.metrics import reward_metrics
from rlswitch.rewards.models.tenant import RewardTenant, check_tenants, prepare_tenants
from rlswitch.rewards.rewards import Rewards
from rlswitch.rollouts.sampler import SingleTurn
from rlswitch.run import Run
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
def rewards(tmp_path: Path, request):
    """rewards("judge", "none", weights=[...]): tenants, built-in functions, or those of FUNCTIONS."""
    file = tmp_path / "mine.py"
    file.write_text(FUNCTIONS)

    def build(*names: str, **options) -> Rewards:
        entries = [f"{file}:{name[1:]}" if name.startswith(":") else name for name in names]
        made = Rewards(RewardConfig(functions=entries, **options), log=lambda line: None)
        request.addfinalizer(made.close)
        return made

    return build


def asked(rewards: Rewards, switch: Switch, tenants: Sequence[RewardTenant], *groups: Group) -> None:
    rewards.tenants = tenants
    rewards.score(groups, switch)


# -- models and functions together -------------------------------------------------------------


def test_models_and_functions_are_weighted_and_named_in_the_order_of_the_list(rewards, switch, log):
    rewards = rewards("reward_model", "exact_match", "judge", weights=[10.0, 1.0, 100.0])
    assert rewards.names == ["reward_model", "exact_match", "judge"]
    tenants = [
        FakeTenant("reward model", log, lambda t: 0.5),
        FakeTenant("judge", log, lambda t: float(t == "8")),
    ]
    groups = [group("7", "8")]
    asked(rewards, switch, tenants, *groups)
    first, second = groups[0].rollouts
    assert list(first.rewards.items()) == [("reward_model", 0.5), ("exact_match", 1.0), ("judge", 0.0)]
    assert (first.reward, second.reward) == (6.0, 105.0)
    assert second.extra == {"reward_model": "8", "judge": "8"}
    metrics = reward_metrics(groups, rewards.names)
    assert metrics["reward/judge/mean"] == 0.5 and metrics["reward/reward_model/error_rate"] == 0.0


def test_a_model_without_an_answer_is_an_error_like_a_functions(rewards, switch, log):
    rewards = rewards("judge", "exact_match", max_error_rate=0.5)
    scored = group("7", "8")
    tenants = [FakeTenant("judge", log, lambda t: None if t == "8" else 1.0)]
    asked(rewards, switch, tenants, scored)
    assert [it.text for it in scored.rollouts] == ["7"]
    assert [it.errors for it in scored.failed] == [{"judge": "fell silent"}]
    assert reward_metrics([scored], rewards.names)["reward/judge/error_rate"] == 0.5
    with pytest.raises(
        RewardError, match=r"reward 'judge' fell silent for row 3, sample 1 \(prompt '1\+6='\)"
    ):
        asked(rewards, switch, tenants, group("7", "8", "8", "8"))


def test_models_alone_need_no_worker(rewards, switch, log):
    before = set(psutil.Process().children())
    rewards = rewards("judge")
    assert (rewards.names, rewards.correctness) == (["judge"], "judge")
    assert set(psutil.Process().children()) <= before
    rewards.check_columns(["answer"])
    scored = group("7")
    asked(rewards, switch, [FakeTenant("judge", log, lambda t: 0.25)], scored)
    assert scored.rollouts[0].reward == 0.25


def test_a_function_of_the_same_name_takes_another(rewards):
    assert rewards(":judge", "judge").names == ["judge_2", "judge"]
    assert rewards(":judge", "exact_match").names == ["judge", "exact_match"]


def test_where_no_function_applies_a_model_may(rewards, switch, log):
    rewards, scored = rewards(":none", "judge"), group("7", "8")
    asked(rewards, switch, [FakeTenant("judge", log, lambda t: 1.0)], scored)
    assert [it.rewards for it in scored.rollouts] == [{"judge": 1.0}] * 2


def test_where_nothing_applies_it_is_an_error_once_all_have_been_asked(rewards):
    with pytest.raises(RewardError, match="returned None, as every function did"):
        rewards(":none").score([group("7")], None)
    unasked = group("7")
    rewards(":none", "judge").score([unasked], None)
    assert len(unasked.rollouts) == 1


# -- turns on the device -----------------------------------------------------------------------


def test_each_has_the_device_to_itself_while_it_scores(rewards, switch, log, tmp_path):
    rewards = rewards("judge", "reward_model")
    switch.holder = FakeTenant("engine", log, lambda t: None)
    tenants = [FakeTenant("judge", log, lambda t: 1.0), FakeTenant("reward model", log, lambda t: 1.0)]
    asked(rewards, switch, tenants, group("7", "8"))
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
    """session(rewards, tenants): what evaluate() looks at; the engine answers 7 greedily, then 7 and 8."""

    def build(rewards: Rewards, tenants: Sequence[RewardTenant] = ()):
        rewards.tenants = tenants

        def generate(prompts, sampling):
            log.append(f"engine generates at {sampling.temperature:g}")
            return [group(*("7", "8")[: sampling.num_samples]), group("8", answer="9")]

        engine = SimpleNamespace(
            version=0, generate=generate, forget_prefixes=lambda: log.append("engine forgets")
        )
        return SimpleNamespace(
            sampler=SingleTurn(),
            run=make_run(evaluation={"num_samples": 2}),
            engine=engine,
            rewards=rewards,
            held_out=[],
            switch=switch,
            ledger=switch.ledger,
        )

    return build


def test_a_function_says_what_is_right_and_no_model_is_asked(rewards, session, log):
    tenants = [FakeTenant("judge", log, lambda t: 1.0)]
    metrics = evaluate(session(rewards("judge", "exact_match"), tenants))
    assert metrics == {"val/addition/acc": 0.5, "val/addition/pass@2": 0.5}
    assert log == ["engine generates at 0", "engine generates at 1", "engine forgets"]


def test_without_a_function_the_first_model_is_asked_once_the_engine_is_done(rewards, session, log):
    tenants = [
        FakeTenant("reward model", log, lambda t: float(t == "8")),
        FakeTenant("judge", log, lambda t: 1.0),
    ]
    metrics = evaluate(session(rewards("reward_model", "judge"), tenants))
    assert metrics == {"val/addition/acc": 0.5, "val/addition/pass@2": 1.0}
    assert log[2:4] == ["engine forgets", "reward model acquires"]
    assert not [line for line in log if line.startswith("judge")]


def test_rows_that_no_function_applies_to_do_not_count(rewards, session):
    metrics = evaluate(session(rewards(":none", "judge"), [FakeTenant("judge", [], lambda t: 1.0)]))
    assert math.isnan(metrics["val/addition/acc"])


def test_a_row_that_the_judging_function_does_not_apply_to_is_not_wrong(rewards, session):
    some = session(rewards("exact_match", "length"))
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


# -- a new tenant ------------------------------------------------------------------------------

LOOKUP = """
import json
from pathlib import Path

from rlswitch.errors import ConfigError
from rlswitch.rewards.models.tenant import RewardTenant, TenantSpec
from rlswitch.run import Run
from rlswitch.types import Score


class Lookup(RewardTenant):
    reward, name = "lookup", "lookup table"

    def __init__(self, table, ledger):
        self.table, self.ledger = table, ledger

    def acquire(self, weights): ...
    def release(self): ...
    def unreleased(self): ...
    def close(self): ...

    @property
    def pids(self):
        return []

    def score(self, rollouts):
        return [Score(value=self.table.get(it.text), error="" if it.text in self.table else "is not listed")
                for it in rollouts]


def check(run, path, prompts):
    table = json.loads((Path(path) / "table.json").read_text())
    if not table:
        raise ConfigError(f"lookup.path = {path}: the table is empty")
    return table


def prepare(run, prompts, policy, log):
    table = check(run, run.lookup.path, prompts)
    return lambda ledger, *_: Lookup(table, ledger)


def problems(run):
    if run.lookup.level == "2":
        yield "lookup.level = 2: a table does not sleep; set lookup.level=1"


SPEC = TenantSpec(check=check, prepare=prepare, problems=problems)
"""


@dataclass(kw_only=True, slots=True)
class LookupConfig(TenantConfig):
    device_name: ClassVar[str] = "lookup table"


@dataclass(kw_only=True, slots=True)
class RunWithLookup(Run):
    lookup: LookupConfig = field(default_factory=LookupConfig)


@pytest.fixture
def with_lookup(tmp_path: Path, monkeypatch, make_run) -> Callable[..., RunWithLookup]:
    """One file, one line in TENANTS, one section: a run that looks up scores, next to exact_match."""
    (tmp_path / "lookup_tenant.py").write_text(LOOKUP)
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "table.json").write_text(json.dumps({"7": 0.25, "8": 4.0}))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(TENANTS, "lookup", "lookup_tenant")

    def build(**lookup) -> RunWithLookup:
        base = make_run(reward={"functions": ["lookup", "exact_match"], "weights": [1.0, 2.0]})
        settings = {item.name: getattr(base, item.name) for item in fields(base)}
        return RunWithLookup(**settings, lookup=LookupConfig(path=str(tmp_path / "table"), **lookup))

    return build


def test_a_new_tenant_is_validated_like_the_others(with_lookup, tmp_path):
    run = with_lookup()
    assert not list(tenant_problems(run))
    assert list(tenant_problems(with_lookup(level="2"))) == [
        "lookup.level = 2: a table does not sleep; set lookup.level=1"
    ]
    (missing,) = tenant_problems(replace(run, lookup=LookupConfig()))
    assert missing.startswith("lookup.path = null: reward.functions names 'lookup'; set a directory")
    (unused,) = tenant_problems(replace(run, reward=RewardConfig()))
    assert unused.startswith(
        f"lookup.path = {tmp_path / 'table'}: reward.functions = ['exact_match'] does not"
    )
    check_tenants(run, [group("7").prompt])
    (tmp_path / "table" / "table.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"lookup\.path = .*: the table is empty"):
        check_tenants(run, [group("7").prompt])


def test_a_new_tenant_takes_its_turn_and_scores(with_lookup, switch, tmp_path, request, log):
    run, scored = with_lookup(), group("7", "8", "9")
    tenants = prepare_tenants(run, [scored.prompt], build_tokenizer(), print)
    rewards = Rewards(replace(run.reward, max_error_rate=0.5), log=log.append)
    request.addfinalizer(rewards.close)
    with ExitStack() as stack:
        rewards.tenants, _ = start_tenants(tenants, switch, tmp_path, tmp_path, print, stack)
        rewards.score([scored], switch)
    assert switch.holder is rewards.tenants[0]
    assert [rollout.rewards for rollout in scored.rollouts] == [
        {"lookup": 0.25, "exact_match": 1.0},
        {"lookup": 4.0, "exact_match": 0.0},
    ]
    assert [rollout.reward for rollout in scored.rollouts] == [2.25, 4.0]
    assert scored.failed[0].errors == {"lookup": "is not listed"}
    assert reward_metrics([scored], rewards.names)["reward/lookup/mean"] == 2.125
    assert log == ["warning: reward 'lookup' is not listed for row 3, sample 2 (prompt '1+6='); left out"]
