"""The reward `judge`: a second language model reads prompt and completion and replies with a score.

It is a frozen engine (engines/start.py): it sleeps while others have the device, reloads its own checkpoint,
and is proven at every wake-up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from rlswitch.config.sections import EngineConfig, JudgeConfig, ModelConfig
from rlswitch.data.hub import context_of, load_tokenizer, read_config, resolve_model
from rlswitch.data.prompts import encode
from rlswitch.errors import ConfigError
from rlswitch.rewards.models.template import (
    blank_problems,
    fill_in,
    pattern_problems,
    read_score,
    template_problems,
)
from rlswitch.rewards.models.tenant import Log, RewardTenant, StartTenant, TenantSpec
from rlswitch.run import Run
from rlswitch.text import shortened
from rlswitch.types import PolicyWeights, Prompt, Rollout, Sampling, Score

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlswitch.engines.revival import RestartingEngine
    from rlswitch.switch.ledger import Ledger

RETRY_TEMPERATURE = 0.7
"""Of every question after the first, which is sampled greedily."""
ROOM = 2
"""The engine's context is this many times what the first prompts need: later ones may be longer."""


class Judge(RewardTenant):
    """Asks its engine about every rollout, and again where the reply contains no score."""

    reward = "judge"
    name = JudgeConfig.device_name

    def __init__(self, config: JudgeConfig, engine: RestartingEngine, max_model_len: int):
        self.engine = engine
        self._config = config
        self._longest = max_model_len - config.max_new_tokens

    def acquire(self, weights: PolicyWeights | None) -> None:
        self.engine.acquire(weights)

    def release(self) -> None:
        self.engine.release()

    def unreleased(self) -> str | None:
        return self.engine.unreleased()

    @property
    def pids(self) -> list[int]:
        return self.engine.backend.pids

    def close(self) -> None:
        self.engine.close()

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        texts = [
            fill_in(self._config.prompt, it.prompt.messages, it.text, it.prompt.columns) for it in rollouts
        ]
        scores: dict[str, Score] = {}
        unanswered = []
        for index, text in enumerate(dict.fromkeys(texts)):  # identical questions are sent once
            token_ids = encode_question(text, self.engine.tokenizer)
            if len(token_ids) > self._longest:
                error = f"needs a question of {len(token_ids)} tokens, there is room for {self._longest}"
                scores[text] = Score(error=error)
            else:
                unanswered.append(Prompt(index=index, messages=text, token_ids=token_ids))
        for attempt in range(1 + self._config.retries):
            if unanswered:
                replies = self._ask(unanswered, attempt, rollouts[0].policy_version)
                scores |= {text: self._read(reply, attempt) for text, reply in replies.items()}
                unanswered = [it for it in unanswered if scores[str(it.messages)].error]
        return [scores[text] for text in texts]

    def _ask(self, prompts: Sequence[Prompt], attempt: int, step: int) -> dict[str, str]:
        sampling = Sampling(
            num_samples=1,
            max_new_tokens=self._config.max_new_tokens,
            temperature=RETRY_TEMPERATURE if attempt else 0.0,
            seed=attempt,
            step=step,
        )
        groups = self.engine.generate(prompts, sampling)
        return {str(group.prompt.messages): group.rollouts[0].text for group in groups}

    def _read(self, reply: str, attempt: int) -> Score:
        value = read_score(reply, self._config.pattern, self._config.scale)
        extra = {self.reward: reply[:500]}
        if value is None:
            where = f"in {attempt + 1} replies" if attempt else "in its reply"
            return Score(error=f"gave no score {where}: {shortened(repr(reply), 60)}", extra=extra)
        return Score(value=value, extra=extra)


def check_judge(run: Run, path: str, prompts: Sequence[Prompt]) -> tuple[PreTrainedTokenizerBase, int]:
    """Tokenizer of the judge in `path`, and the context length in tokens that its engine gets.

    That is ROOM times what question and reply need for `prompts`, up to the model's limit. Raises ConfigError
    when they need more than the limit, or when the question has unknown blanks.
    """
    columns = [name for name in prompts[0].columns if all(name in it.columns for it in prompts)]
    if problems := list(blank_problems(run.judge.prompt, columns)):
        raise ConfigError(*problems)
    assert run.judge.path is not None, "command/checks.py requires it"
    model = ModelConfig(path=run.judge.path)
    tokenizer = load_tokenizer(model, path, "judge.path")
    limit = context_of(read_config(model, path, "judge.path"))
    questions = (fill_in(run.judge.prompt, it.messages, "", it.columns) for it in prompts)
    longest = max(len(encode_question(question, tokenizer)) for question in questions)
    need = longest + run.rollout.max_new_tokens + run.judge.max_new_tokens
    if limit is not None and need > limit:
        raise ConfigError(
            f"judge.path = {run.judge.path}: its context is {limit} tokens, a question is up to {longest}, a"
            f" completion rollout.max_new_tokens {run.rollout.max_new_tokens}, a reply judge.max_new_tokens"
            f" {run.judge.max_new_tokens}: {need} would not fit; shorten one of them, or set another judge"
        )
    return tokenizer, min(ROOM * need, limit or ROOM * need)


def encode_question(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """One chat message where the tokenizer has a chat template, otherwise plain text."""
    return encode([{"role": "user", "content": text}] if tokenizer.chat_template else text, tokenizer)


def prepare_judge(
    run: Run, prompts: Sequence[Prompt], policy: PreTrainedTokenizerBase, log: Log
) -> StartTenant:
    """Finds the judge's model; its engine gets room for questions about `prompts`. Raises ConfigError."""
    from rlswitch.engines.spec import engine_spec  # these load torch
    from rlswitch.engines.start import start_engine
    from rlswitch.switch.device import Device

    assert run.judge.path is not None, "command/checks.py requires it"
    model = ModelConfig(path=run.judge.path, dtype=run.model.dtype)
    path = resolve_model(model, log, "judge.path")
    tokenizer, length = check_judge(run, path, prompts)
    shared = {item.name: getattr(run.engine, item.name) for item in fields(EngineConfig)}
    spec = engine_spec(
        Judge.name,
        model,
        EngineConfig(**shared),
        replace(run.switch, level=run.judge.level),
        Device.detect(),
        model_path=path,
        max_model_len=length,
        seed=run.seed,
    )

    def start(ledger: Ledger, output_dir: Path, scratch: Path, log: Log) -> Judge:
        log_path = output_dir / "judge.log"
        engine = start_engine(spec, tokenizer, ledger, log_path, scratch, frozen=True, log=log)
        return Judge(run.judge, engine, length)

    return start


SPEC = TenantSpec(
    check=check_judge,
    prepare=prepare_judge,
    problems=lambda run: chain(template_problems(run.judge.prompt), pattern_problems(run.judge.pattern)),
)
