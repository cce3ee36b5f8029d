"""An environment in the real loop: the policy sees its words but does not train on them."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes import BUILD, FakeBackend, build_session

from rlswitch import loop
from rlswitch.engines.revival import RestartingEngine
from rlswitch.processes.signals import preemptible
from rlswitch.rollouts.sampler import Sampler
from rlswitch.types import Group, Prompt, Sampling

pytestmark = pytest.mark.processes  # reward workers
OBSERVATION = [3, 11]


class TwoTurns(Sampler):
    """The policy speaks, the environment says OBSERVATION, the policy speaks again."""

    def __init__(self, rubbish: float):
        self.rubbish = rubbish

    def sample(self, engine: RestartingEngine, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        groups = engine.generate(prompts, sampling)
        first = [rollout for group in groups for rollout in group.rollouts]
        asked = [
            replace(it.prompt, token_ids=it.prompt.token_ids + it.token_ids + OBSERVATION) for it in first
        ]
        second = [group.rollouts[0] for group in engine.generate(asked, replace(sampling, num_samples=1))]
        for one, two in zip(first, second, strict=True):
            one.learned = [True] * len(one.token_ids) + [False, False] + [True] * len(two.token_ids)
            one.token_ids = one.token_ids + OBSERVATION + two.token_ids
            one.logprobs = one.logprobs + [self.rubbish] * 2 + two.logprobs
            one.text += two.text
        return groups


@pytest.fixture
def train(make_run, make_trainer, tiny_model, monkeypatch, tmp_path):
    """train(name, sampler): the weights after two steps, the backend, and the run's directory."""

    def run_loop(name: str, sampler: Sampler | None):
        run = make_run("grpo", num_steps=2, data={"eval_rows": 2}, evaluation={"every": 0})
        run.output_dir, run.reward.functions = str(tmp_path / name), [f"{tmp_path}/spread.py:spread"]
        (tmp_path / "spread.py").write_text(
            "def spread(prompts, completions, **columns): return [i % 3 for i in range(len(prompts))]\n"
        )
        backend, trainer = FakeBackend(), make_trainer(run)
        tokenizer = tiny_model().tokenizer

        def build(_run, _inputs, stop_signals, stack):
            return build_session(run, backend, trainer, tokenizer, stop_signals, stack, sampler=sampler)

        monkeypatch.setattr(BUILD, build)
        with preemptible() as stop_signals:
            loop.train(run, None, stop_signals)
        weights = {name: it.detach().clone() for name, it in trainer.policy.named_parameters()}
        return weights, backend, Path(run.output_dir)

    return run_loop


def test_an_environment_trains_and_its_own_tokens_teach_nothing(train) -> None:
    weights, backend, out = train("one", TwoTurns(rubbish=-0.5))
    others, _, _ = train("two", TwoTurns(rubbish=-80.0))
    single, _, _ = train("three", None)
    assert all(torch.equal(weights[name], others[name]) for name in weights), (
        "log-probabilities of observations"
    )
    assert any(not torch.equal(weights[name], single[name]) for name in weights), "the turns are trained on"
    assert all(request.token_ids[-2:] == OBSERVATION for request in backend.requests), (
        "the policy has read it"
    )
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [it["response_length/mean"] for it in metrics] == [6.0, 6.0]  # 2 + 2 observed + 2
    assert all(it["actor/grad_norm"] > 0 for it in metrics)
