"""A real vLLM engine, and a model to push into it."""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rlswitch.recipes.addition.task import build_tokenizer
from samples import tiny_config
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

from rlswitch.config.sections import EngineConfig, ModelConfig, ServerEngineConfig, SwitchConfig
from rlswitch.engines.engine import Engine, State
from rlswitch.engines.spec import EngineSpec, Launch, engine_spec
from rlswitch.engines.vllm.backend import VLLMBackend
from rlswitch.engines.vllm.local import LocalBackend
from rlswitch.engines.vllm.server import ServerBackend
from rlswitch.proof import checks as proof
from rlswitch.proof.canary import canary_sequences
from rlswitch.switch.device import Device
from rlswitch.switch.ledger import Ledger
from rlswitch.training.logprobs import sequence_logprobs
from rlswitch.training.publish import Publisher
from rlswitch.types import Canary, PolicyWeights

BLOCK = 32
BACKENDS: dict[str, type[VLLMBackend]] = {"local": LocalBackend, "server": ServerBackend}
SETTINGS = {"local": EngineConfig, "server": ServerEngineConfig}


def build_model() -> Qwen3ForCausalLM:
    """Tied embeddings, and as many key heads as query heads, so q and k have the same shape."""
    torch.manual_seed(0)
    config = tiny_config(
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval()


@dataclass
class Bench:
    """A backend and a model to push, from which tests create engines and policy versions."""

    spec: EngineSpec
    backend: VLLMBackend
    start: Callable[[], VLLMBackend]
    """Starts another backend like `backend`."""
    model: Qwen3ForCausalLM
    tokenizer: PreTrainedTokenizerBase
    ledger: Ledger
    publisher: Publisher
    canary: list[list[int]]
    versions: int = 0

    def engine(self, level: str = "2", verify: str = "every", tolerance: float = 1e-4) -> Engine:
        """An engine over the shared backend, which is asleep at level 2."""
        spec = replace(self.spec, level=level, verify=verify)
        engine = Engine(spec, self.backend, self.tokenizer, self.ledger, proof.Tolerance(tolerance))
        engine.state = State.ASLEEP
        return engine

    def publish(self, noise: float = 0.02) -> PolicyWeights:
        """A new version, each parameter moved by `noise`."""
        torch.manual_seed(self.versions)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn_like(parameter) * noise)
        self.versions += 1
        logprobs = sequence_logprobs(self.model, self.canary)
        canary = Canary(sequences=self.canary, logprobs=logprobs)
        return self.publisher.publish(self.model, torch.float32, self.versions, canary)

    def rpc(self, method: str, **kwargs: object) -> list:
        return self.backend.collective_rpc(method, **kwargs)


@contextmanager
def open_bench(directory: Path, engine: str = "local", **settings: Any) -> Iterator[Bench]:
    """Starts vLLM with an untrained model and puts it to sleep."""
    model, tokenizer = build_model(), build_tokenizer()
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    config = SETTINGS[engine](kv_cache_gib=0.125, **settings)
    config.vllm |= {"worker_cls": "worker.SaboteurWorker", "block_size": BLOCK}
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # so that a server finds this worker
    device, model_path = Device.detect(), str(directory / "model")
    spec = engine_spec(
        "rollout engine",
        ModelConfig(path=model_path),
        config,
        SwitchConfig(),
        device,
        model_path=model_path,
        max_model_len=128,
        seed=0,
    )
    canary = canary_sequences([], vocabulary=16, length=2 * BLOCK + 6)
    ledger, publisher = Ledger(device, directory), Publisher("auto", 1 << 20, directory)
    launch = Launch(
        spec=spec,
        tokenizer=tokenizer,
        device=device,
        log_path=directory / "engine.log",
        scratch=publisher.root,
    )
    with closing(publisher):

        def start() -> VLLMBackend:
            return BACKENDS[engine](launch)

        with closing(start()) as backend:
            backend.sleep("2")
            yield Bench(spec, backend, start, copy.deepcopy(model), tokenizer, ledger, publisher, canary)
