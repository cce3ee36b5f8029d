"""The reward `judge`: a language model of its own says what a completion is worth.

It is a frozen engine (engines/start.py): it sleeps while others have the device, reloads its own checkpoint,
and is proven at every wake-up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

from rlswitch.config.sections import TENANTS, EngineConfig, JudgeConfig, ModelConfig
from rlswitch.data.hub import resolve_model
from rlswitch.engines.revival import RestartingEngine
from rlswitch.engines.spec import engine_spec
from rlswitch.engines.start import start_engine
from rlswitch.rewards.models.checks import encode_question, fit_judge
from rlswitch.rewards.models.template import fill_in, read_score
from rlswitch.rewards.models.tenant import Candidate, RewardTenant
from rlswitch.rewards.scorer import Mark
from rlswitch.rewards.workers.worker import shown
from rlswitch.run import Run
from rlswitch.switch.device import Device
from rlswitch.switch.ledger import Ledger
from rlswitch.types import PolicyWeights, Prompt, Rollout, Sampling

RETRY_TEMPERATURE = 0.7
"""Of every question after the first, which is asked greedily."""


class Judge(RewardTenant):
    """Asks its engine about every rollout, and again where the reply holds no score."""

    reward = "judge"
    name = TENANTS[reward]

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


def find_judge(run: Run, prompts: Sequence[Prompt], say: Callable[[str], None]) -> Candidate:
    """The judge's model and what its engine needs for questions about `prompts`. Raises ConfigError."""
    assert run.judge.path is not None, "checks.py has seen it"
    model = ModelConfig(path=run.judge.path, dtype=run.model.dtype)
    path = resolve_model(model, say, "judge.path")
    tokenizer, length = fit_judge(run, path, prompts)
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

    def start(ledger: Ledger, output_dir: Path, scratch: Path, say: Callable[[str], None]) -> Judge:
        log_path = output_dir / "judge.log"
        engine = start_engine(spec, tokenizer, ledger, log_path, scratch, frozen=True, log=say)
        return Judge(run.judge, engine, length)

    return Candidate(Judge.name, start)
