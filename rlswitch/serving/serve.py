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

from rlswitch.command.checks import address_problems, problems
from rlswitch.config.sections import EngineConfig, ModelConfig, ServerEngineConfig, SwitchConfig
from rlswitch.data.hub import context_of, load_tokenizer, read_config, resolve_model
from rlswitch.data.prompts import encode
from rlswitch.engines.engine import Engine
from rlswitch.engines.frozen import start_frozen
from rlswitch.engines.start import refuse_unfit_engine
from rlswitch.engines.vllm.address import parse_url
from rlswitch.engines.vllm.client import Client
from rlswitch.engines.vllm.watch import at_work
from rlswitch.errors import ConfigError
from rlswitch.run import OPTIONS, Run
from rlswitch.switch.device import Device
from rlswitch.switch.ledger import Ledger
from rlswitch.switch.switch import Switch
from rlswitch.types import Prompt, Sampling

MAX_MODEL_LEN = 2048
"""Longest prompt plus completion, unless the caller or the model says less."""


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
    deep an engine sleeps while another one has the device; `settings` are those of EngineConfig. What each
    hand-over took is in switch.jsonl in `output_dir` (default: a temporary directory).
    Raises ConfigError, EngineError, ProofError.
    """
    runs = [frozen_run(model, level=level, dtype=dtype, **settings) for model in models]
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rlswitch-serve-")))
        directory = Path(output_dir or scratch)
        directory.mkdir(parents=True, exist_ok=True)
        switch = Switch(Ledger(Device.detect(), directory))
        engines: list[Engine] = []
        for index, run in enumerate(runs):
            path = resolve_model(run.model, print)
            tokenizer = load_tokenizer(run.model, path)
            log = directory / f"engine-{index}.log"
            where = (switch.ledger, log, scratch)
            engines.append(start_frozen(run.model.path, run, path, tokenizer, *where, print))
            stack.callback(engines[-1].close)
            switch.holder = engines[-1]
            switch.vacate()  # the next one starts on an empty device
        yield (switch, *engines)


def complete(
    engine: Engine,
    prompts: Sequence[str | list[dict[str, str]]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """The completion of each prompt, a text or chat messages, by the engine that has the device."""
    rows = [
        Prompt(index=index, messages=prompt, token_ids=encode(prompt, engine.tokenizer))
        for index, prompt in enumerate(prompts)
    ]
    sampling = Sampling(
        num_samples=1, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, step=0
    )
    return [group.rollouts[0].text for group in engine.generate(rows, sampling)]


def frozen_run(
    model: str, *, level: str = "2", dtype: str = "auto", server: bool = False, **settings: Any
) -> Run:
    """The settings of one frozen engine, in process or over HTTP. Raises ConfigError, EngineError."""
    if model.startswith(("http://", "https://", "unix:")):
        settings, server = settings | {"url": model}, True
        allowed = settings.get("allow_remote", False)
        if found := list(address_problems(ServerEngineConfig(url=model, allow_remote=allowed))):
            raise ConfigError(*found)  # before a word is said to it
        with closing(Client(parse_url(model), at_work(ServerEngineConfig()))) as client:
            model = client.get("/v1/models")["data"][0]["root"]
    try:
        engine = ServerEngineConfig(**settings) if server else EngineConfig(**settings)
    except TypeError as error:
        raise ConfigError(
            f"{error}; the settings are those of rlswitch.config.sections.EngineConfig"
        ) from error
    run = Run(
        model=ModelConfig(path=model, dtype=dtype),
        algorithm=OPTIONS["algorithm"]["grpo"](),  # a Run has one; nothing is trained here
        engine=engine,
        switch=SwitchConfig(level=level),
    )
    if level == "auto":
        raise ConfigError(
            "level = auto: is for training, where weights change; set 1 (in RAM) or 2 (on disk)"
        )
    if engine.max_model_len is None:
        engine.max_model_len = _context(run.model)
    run.data.max_prompt_tokens = run.rollout.max_new_tokens = 1  # of a training run: not asked here
    if found := list(problems(run)):
        raise ConfigError(*found)
    refuse_unfit_engine(run, resolve_model(run.model, print))
    return run


def _context(model: ModelConfig) -> int:
    """How long a sequence may be: the model's own limit, within reason."""
    limit = context_of(read_config(model, resolve_model(model, print)))
    return min(limit or MAX_MODEL_LEN, MAX_MODEL_LEN)
