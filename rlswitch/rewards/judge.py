"""The reward `judge`: a language model of its own says what a completion is worth.

It is a frozen engine (frozen.py): it sleeps while others have the device, goes back to its checkpoint, and
is proven whenever it has come back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rlswitch.config import EngineConfig, JudgeConfig, ModelConfig, Run
from rlswitch.data import encode, load_tokenizer
from rlswitch.engines.base import Engine, Revival
from rlswitch.engines.start import start_backend
from rlswitch.frozen import freeze
from rlswitch.ledger import Ledger
from rlswitch.models import context_of, read_config, resolve_model
from rlswitch.options import did_you_mean
from rlswitch.rewards import TENANTS
from rlswitch.rewards.scorer import Mark
from rlswitch.rewards.template import OWN_BLANKS, blanks, fill_in, read_score
from rlswitch.rewards.tenants import Candidate, RewardTenant
from rlswitch.rewards.worker import shown
from rlswitch.types import ConfigError, PolicyWeights, Prompt, Rollout, Sampling

RETRY_TEMPERATURE = 0.7
"""Of every question after the first, which is asked greedily."""
ROOM = 2
"""The engine takes so many times what the first prompts need: others are longer, tokenizers differ."""


class Judge(RewardTenant):
    """Asks its engine about every rollout, and again where the reply holds no score."""

    reward = "judge"
    name = TENANTS[reward]

    def __init__(self, config: JudgeConfig, engine: Engine, max_model_len: int):
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

    def score(self, rollouts: Sequence[Rollout]) -> list[Mark]:
        texts = [
            fill_in(self._config.prompt, it.prompt.messages, it.text, it.prompt.columns) for it in rollouts
        ]
        marks: dict[str, Mark] = {}
        unanswered = []
        for index, text in enumerate(dict.fromkeys(texts)):  # what is the same is asked once
            token_ids = encode_question(text, self.engine.tokenizer)
            if len(token_ids) > self._longest:
                marks[text] = Mark(
                    error=f"would be asked with {len(token_ids)} tokens, there is room for {self._longest}"
                )
            else:
                unanswered.append(Prompt(index=index, messages=text, token_ids=token_ids))
        for attempt in range(1 + self._config.retries):
            if unanswered:
                replies = self._ask(unanswered, attempt, rollouts[0].policy_version)
                marks |= {text: self._read(reply, attempt) for text, reply in replies.items()}
                unanswered = [it for it in unanswered if marks[str(it.messages)].score is None]
        return [marks[text] for text in texts]

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

    def _read(self, reply: str, attempt: int) -> Mark:
        score = read_score(reply, self._config.pattern, self._config.scale)
        if score is None:
            what = f"in {attempt + 1} replies" if attempt else "in its reply"
            return Mark(error=f"gave no score {what}: {shown(reply)}", extra=reply[:500])
        return Mark(score=score, extra=reply[:500])


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeCandidate(Candidate):
    """The judge's model, looked at; `run` has the settings of its engine."""

    name = Judge.name

    config: JudgeConfig
    run: Run
    path: str
    tokenizer: PreTrainedTokenizerBase

    def start(
        self, ledger: Ledger, output_dir: Path, publish_root: Path, say: Callable[[str], None]
    ) -> Judge:
        where = (ledger.device, output_dir / "judge.log", publish_root)
        start = partial(start_backend, self.run, self.path, self.tokenizer, *where)
        revival = Revival(start=start, limit=self.run.engine.max_restarts, say=say)
        backend = start()
        try:
            engine = freeze(Judge.name, backend, self.run, self.path, self.tokenizer, ledger, revival)
        except BaseException:
            backend.close()
            raise
        return Judge(self.config, engine, self.run.max_model_len)


def find_judge(run: Run, prompts: Sequence[Prompt], say: Callable[[str], None]) -> JudgeCandidate:
    """The judge's model and what its engine needs for questions about `prompts`. Raises ConfigError."""
    assert run.judge.path is not None, "checks.py has seen it"
    model = ModelConfig(path=run.judge.path, dtype=run.model.dtype)
    columns = [name for name in prompts[0].columns if all(name in it.columns for it in prompts)]
    refuse_unknown_blanks(run.judge.prompt, columns)
    path = resolve_model(model, say, "judge.path")
    tokenizer = load_tokenizer(model, path, "judge.path")
    limit = context_of(read_config(model, path, "judge.path"))
    shared = {item.name: getattr(run.engine, item.name) for item in fields(EngineConfig)}
    shared["max_model_len"] = room_for(run, prompts, tokenizer, limit)
    switch = replace(run.switch, level=run.judge.level)
    return JudgeCandidate(
        config=run.judge,
        run=replace(run, model=model, engine=EngineConfig(**shared), switch=switch),
        path=path,
        tokenizer=tokenizer,
    )


def refuse_unknown_blanks(template: str, columns: Sequence[str]) -> None:
    """Raises ConfigError, a line for each blank that no column of the dataset fills in."""
    known = [*OWN_BLANKS, *columns]
    if problems := [
        f"judge.prompt: {{{name}}} is no column of the dataset, so it could not be filled in; there is"
        f" {', '.join(known)}{did_you_mean(name, known)}"
        for name in dict.fromkeys(blanks(template))
        if name not in known
    ]:
        raise ConfigError(*problems)


def room_for(
    run: Run, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> int:
    """How many tokens question and reply may have together: what `prompts` need, and some room.

    Raises ConfigError when that is more than the `limit` of the judge's context.
    """
    longest = max(
        len(encode_question(fill_in(run.judge.prompt, it.messages, "", it.columns), tokenizer))
        for it in prompts
    )
    need = longest + run.rollout.max_new_tokens + run.judge.max_new_tokens
    if limit is not None and need > limit:
        raise ConfigError(
            f"judge.path = {run.judge.path}: its context is {limit} tokens, a question is up to {longest}, a"
            f" completion rollout.max_new_tokens {run.rollout.max_new_tokens}, a reply judge.max_new_tokens"
            f" {run.judge.max_new_tokens}: {need} would not fit; shorten one of them, or set another judge"
        )
    return min(ROOM * need, limit or ROOM * need)


def encode_question(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """One message of a chat where the tokenizer has a template for it, plain text where not."""
    return encode([{"role": "user", "content": text}] if tokenizer.chat_template else text, tokenizer)
