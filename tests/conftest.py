"""Fixtures for several test files: a tiny model, runs built without the command line, no network."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import pytest
from samples import tiny_config

from rlswitch.config.sections import DataConfig, EngineConfig, ModelConfig, RolloutConfig
from rlswitch.run import OPTIONS, Run
from rlswitch.types import Group, Prompt, Rollout

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

hypothesis.settings.register_profile("rlswitch", deadline=None)  # no test depends on time
hypothesis.settings.load_profile("rlswitch")

PAD = 12  # the character tokenizer's
SHARE_A_BENCH = {"test_contract", "test_sabotage", "test_frozen", "test_server_engine"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Schedules single tests, but keeps tests together that share an engine, which starts slowly.

    Marks for pytest-xdist's own groups do nothing: 3.8.0 cannot change a node id of pytest 9.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if not nodeid.startswith("tests/engines/"):
                return nodeid
            file = Path(nodeid.split("::")[0]).stem
            return "bench" if file in SHARE_A_BENCH else file

    return Scheduling(config, log)


class TinyModel(NamedTuple):
    path: Path
    model: Any
    tokenizer: Any


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """One thread: a fixed summation order, no contention. Touches torch only if a test imported it."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyModel]:
    """tiny_model(tie=True): a Qwen3 with random weights that vLLM can run. Read only."""
    made: dict[bool, TinyModel] = {}

    def make(tie: bool = True) -> TinyModel:
        if tie not in made:
            made[tie] = make_tiny_model(tmp_path_factory.mktemp("tiny-model"), tie)
        return made[tie]

    return make


@pytest.fixture
def make_run(tmp_path: Path, tiny_model: Callable[..., TinyModel]) -> Callable[..., Run]:
    """make_run("ppo", seed=3, trainer={"lr": 0.1}): sections as dictionaries, other settings as they are."""

    def make(algorithm: str = "grpo", *, tie: bool = True, **settings: Any) -> Run:
        path = str(tiny_model(tie).path)
        sections = {
            "model": ModelConfig(path=path, dtype="float32"),
            "data": DataConfig(path="builtin:addition", max_prompt_tokens=8),
            "rollout": RolloutConfig(num_prompts=2, group_size=3, max_new_tokens=6),
        }
        run = Run(
            output_dir=str(tmp_path / "run"),
            logger=[],
            algorithm=OPTIONS["algorithm"][algorithm](**settings.pop("options", {})),
            engine=EngineConfig(),
            **sections,
        )
        for name, value in settings.items():
            section = getattr(run, name)
            setattr(run, name, replace(section, **value) if isinstance(value, dict) else value)
        return run

    return make


@pytest.fixture
def make_trainer(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """make_trainer(run): a real Trainer on the CPU, publishing into the test's directory."""
    import torch

    from rlswitch.switch.device import Device
    from rlswitch.switch.ledger import Ledger
    from rlswitch.training.publish import Publisher
    from rlswitch.training.trainer import Trainer

    device, publishers = Device("cpu"), []

    def make(run: Run, engine_dtype: torch.dtype = torch.float32) -> Trainer:
        output_dir = Path(run.output_dir)
        output_dir.mkdir(exist_ok=True)
        publishers.append(Publisher("disk", 0, output_dir))
        return Trainer(
            run,
            run.model.path,
            engine_dtype,
            PAD,
            Ledger(device, output_dir),
            publishers[-1],
            [[13, 1, 2, 10, 3, 4, 11], [9, 8, 0, 15, 12, 3]],
            print,
        )

    yield make
    for publisher in publishers:
        publisher.close()


@pytest.fixture
def make_groups() -> Callable[..., list[Group]]:
    """make_groups(version=0): two prompts, three rollouts each, all different in length."""

    def make(version: int = 0) -> list[Group]:
        groups = []
        for index, prompt_ids in enumerate([[13, 1, 2, 10, 3, 4, 11], [13, 5, 11]]):
            prompt = Prompt(index=index, messages="", token_ids=prompt_ids)
            rollouts = [
                Rollout(
                    prompt=prompt,
                    sample=sample,
                    token_ids=[(3 * index + 5 * sample + t + version) % 10 for t in range(length)],
                    logprobs=[-2.0] * length,
                    text="",
                    finish_reason="stop",
                    policy_version=version,
                    reward=float((index + sample) % 3),
                )
                for sample, length in enumerate([(1, 6, 3), (4, 2, 5)][index])
            ]
            groups.append(Group(prompt=prompt, rollouts=rollouts))
        return groups

    return make


def make_tiny_model(path: Path, tie: bool) -> TinyModel:
    import torch
    from rlswitch.recipes.addition.task import build_tokenizer
    from transformers import Qwen3ForCausalLM

    tokenizer = build_tokenizer()
    config = tiny_config(tie_word_embeddings=tie)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config).eval()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return TinyModel(path, model, tokenizer)
