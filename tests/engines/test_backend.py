"""What both ways of driving vLLM share, without a vLLM: the calls are recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rlswitch.recipes.addition.task import build_tokenizer
from samples import make_spec

from rlswitch.engines.backend import Completion
from rlswitch.engines.spec import Launch
from rlswitch.engines.vllm.backend import VLLMBackend
from rlswitch.engines.vllm.kv_cache import kv_storages
from rlswitch.switch.device import Device

SEQUENCES = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]


class RecordedBackend(VLLMBackend):
    """Answers with the tokens themselves, and records the batches."""

    def __init__(self, launch: Launch):
        self.batches: list[list[list[int]]] = []
        super().__init__(launch, elsewhere=True)

    def collective_rpc(self, method: str, **kwargs: Any) -> list[Any]:
        return [{"pid": 0, "block_size": 16, "dtype": "bfloat16"}]

    def call(self, verb: str, **arguments: Any) -> Any:
        raise AssertionError(verb)

    def close(self) -> None:
        pass

    def _is_sleeping(self) -> bool:
        return False

    def _run(self, prompts, parameters, into) -> None:
        assert len(prompts) == len(parameters)
        self.batches.append(list(prompts))
        for index, tokens in enumerate(prompts):
            scored = [-float(token) for token in tokens[1:]]
            into[index] = Completion([0], [0.0], "stop", scored, cached_tokens=len(tokens))


@pytest.fixture
def backend(tmp_path: Path) -> RecordedBackend:
    spec = make_spec(model_path=str(tmp_path))
    return RecordedBackend(
        Launch(
            spec=spec,
            tokenizer=build_tokenizer(),
            device=Device("cpu"),
            log_path=tmp_path / "log",
            scratch=tmp_path,
            warm_up=False,
        )
    )


def test_each_sequence_is_scored_in_a_batch_of_one(backend: RecordedBackend) -> None:
    assert backend.score(SEQUENCES) == [[-2.0, -3.0], [-5.0], [-7.0, -8.0, -9.0]]
    assert backend.batches == [[tokens] for tokens in SEQUENCES]


def test_cached_tokens_are_counted_in_one_batch(backend: RecordedBackend) -> None:
    assert backend.count_cached_tokens(SEQUENCES) == 9
    assert backend.batches == [SEQUENCES]


def test_the_storages_of_a_hybrid_models_cache_are_found_in_its_lists() -> None:
    shared, state, convolution = torch.zeros(24), torch.zeros(10), torch.zeros(6)
    caches = [shared[:12].view(3, 4), [convolution, state], shared[12:], (state[:5], state[5:])]
    assert sorted(it.nbytes() for it in kv_storages(caches)) == [4 * 6, 4 * 10, 4 * 24]
    for storage in kv_storages(caches):
        storage.resize_(0)
    assert [it.nbytes() for it in kv_storages(caches)] == [0]
    assert kv_storages([]) == []
