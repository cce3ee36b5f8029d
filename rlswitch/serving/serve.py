"""The switch without reinforcement learning: models that take turns on one device.

    with rlswitch.serve("model-a", "model-b") as (switch, a, b):
        switch.give_to(a)
        print(rlswitch.complete(a, ["12+34="]))

docs/switching.md has the whole program.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from rlswitch.config.fields import field_problems
from rlswitch.config.sections import EngineConfig, ModelConfig, ServerEngineConfig, SwitchConfig
from rlswitch.data.hub import context_of, load_tokenizer, read_config, resolve_model
from rlswitch.data.prompts import encode
from rlswitch.engines.engine import Engine
from rlswitch.engines.revival import RestartingEngine
from rlswitch.engines.settings import engine_problems
from rlswitch.engines.spec import EngineSpec, engine_spec
from rlswitch.engines.start import check_engine, start_engine
from rlswitch.engines.vllm.address import parse_url
from rlswitch.engines.vllm.client import Client
from rlswitch.engines.vllm.watch import at_work
from rlswitch.errors import ConfigError
from rlswitch.switch.device import Device
from rlswitch.switch.ledger import Ledger
from rlswitch.switch.switch import Switch
from rlswitch.types import Prompt, Sampling

MAX_MODEL_LEN = 2048
"""Longest prompt plus completion, unless the caller sets one or the model's context is shorter."""


@contextmanager
def serve(
    *models: str,
    level: str = "2",
    dtype: str = "auto",
    output_dir: str | Path | None = None,
    **settings: Any,
) -> Iterator[tuple[Any, ...]]:
    """Starts an engine for each model and yields (switch, engine, engine, ...), all engines asleep.

    `models` are directories, hub ids, or addresses of running servers (http://HOST:PORT); `level` is how
    deep an engine sleeps while another one has the device; `settings` are those of EngineConfig. The seconds
    and bytes of every hand-over are in switch.jsonl in `output_dir` (default: a temporary directory).
    Raises ConfigError, EngineError, ProofError.
    """
    specs = [frozen_spec(model, level=level, dtype=dtype, **settings) for model in models]
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rlswitch-serve-")))
        directory = Path(output_dir or scratch)
        directory.mkdir(parents=True, exist_ok=True)
        switch = Switch(Ledger(Device.detect(), directory))
        engines: list[RestartingEngine] = []
        for index, spec in enumerate(specs):
            tokenizer = load_tokenizer(ModelConfig(path=spec.name), spec.model_path)
            log_path = directory / f"engine-{index}.log"
            engines.append(start_engine(spec, tokenizer, switch.ledger, log_path, scratch, frozen=True))
            stack.callback(engines[-1].close)
            switch.holder = engines[-1]
            switch.vacate()  # the next one starts on an empty device
        yield (switch, *engines)


def complete(
    engine: Engine | RestartingEngine,
    prompts: Sequence[str | list[dict[str, str]]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """One completion per prompt, a text or chat messages, from the engine that holds the device."""
    rows = [
        Prompt(index=index, messages=prompt, token_ids=encode(prompt, engine.tokenizer))
        for index, prompt in enumerate(prompts)
    ]
    sampling = Sampling(
        num_samples=1, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, step=0
    )
    return [group.rollouts[0].text for group in engine.generate(rows, sampling)]


def frozen_spec(
    model: str, *, level: str = "2", dtype: str = "auto", server: bool = False, **settings: Any
) -> EngineSpec:
    """The spec of a frozen engine, named after its model. Raises ConfigError, EngineError.

    `server`: over HTTP; always so for an address in the place of `model`.
    """
    is_address = model.startswith(("http://", "https://", "unix:"))
    if is_address:
        settings["url"] = model
    try:
        engine = ServerEngineConfig(**settings) if server or is_address else EngineConfig(**settings)
    except TypeError as error:
        raise ConfigError(f"{error}; settings: those of rlswitch.config.sections.EngineConfig") from error
    config, switch = ModelConfig(path=model, dtype=dtype), SwitchConfig(level=level)
    sections = {"model.": config, "switch.": switch, "engine.": engine}
    found = [line for prefix, section in sections.items() for line in field_problems(section, prefix)]
    found += engine_problems(engine)
    if level == "auto":
        found.append("level = auto: is for training, where weights change; set 1 (in RAM) or 2 (on disk)")
    if found:
        raise ConfigError(*found)
    if is_address:
        with closing(Client(parse_url(model), at_work(engine))) as client:
            config.path = client.get("/v1/models")["data"][0]["root"]
    path = resolve_model(config, print)
    limit = context_of(read_config(config, path)) or MAX_MODEL_LEN
    spec = engine_spec(
        config.path,
        config,
        engine,
        switch,
        Device.detect(),
        model_path=path,
        max_model_len=engine.max_model_len or min(limit, MAX_MODEL_LEN),
        seed=0,
    )
    check_engine(spec, config.path)
    return spec
