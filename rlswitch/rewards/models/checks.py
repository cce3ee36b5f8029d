"""Whether the models that rewards name can do what is asked of them, as far as their files tell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlswitch.config.fields import did_you_mean
from rlswitch.config.sections import ModelConfig
from rlswitch.data.hub import context_of, load_tokenizer, read_config
from rlswitch.data.prompts import encode
from rlswitch.errors import ConfigError
from rlswitch.rewards.models.template import OWN_BLANKS, blanks, fill_in
from rlswitch.run import Run
from rlswitch.types import Prompt

if TYPE_CHECKING:  # it takes seconds to import
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

ROOM = 2
"""The engine takes so many times what the first prompts need: others are longer, tokenizers differ."""


def refuse_unfit_tenants(run: Run, prompts: Sequence[Prompt]) -> None:
    """Raises ConfigError for models in directories; others have yet to be made or downloaded."""
    rewards, judge, reward_model = run.reward.functions, run.judge.path, run.reward_model.path
    if "judge" in rewards and judge and Path(judge).is_dir():
        fit_judge(run, judge, prompts)
    if "reward_model" in rewards and reward_model and Path(reward_model).is_dir():
        fit_reward_model(run, reward_model)


def fit_judge(run: Run, path: str, prompts: Sequence[Prompt]) -> tuple[PreTrainedTokenizerBase, int]:
    """Tokenizer of the judge in `path`, and how many tokens its engine is to take. Raises ConfigError."""
    columns = [name for name in prompts[0].columns if all(name in it.columns for it in prompts)]
    refuse_unknown_blanks(run.judge.prompt, columns)
    assert run.judge.path is not None, "checks.py has seen it"
    model = ModelConfig(path=run.judge.path)
    tokenizer = load_tokenizer(model, path, "judge.path")
    limit = context_of(read_config(model, path, "judge.path"))
    return tokenizer, room_for(run, prompts, tokenizer, limit)


def fit_reward_model(run: Run, path: str) -> tuple[PreTrainedTokenizerBase, PretrainedConfig]:
    """Tokenizer and configuration of the classifier in `path`. Raises ConfigError unless it has one label."""
    assert run.reward_model.path is not None, "checks.py has seen it"
    model = ModelConfig(path=run.reward_model.path)
    tokenizer = load_tokenizer(model, path, "reward_model.path")
    config = read_config(model, path, "reward_model.path")
    kinds = config.architectures or []
    if not any("SequenceClassification" in kind for kind in kinds):
        raise unusable(
            model.path, f"is no sequence classifier ({', '.join(kinds)}): its scores would be made up"
        )
    if config.num_labels != 1:
        raise unusable(model.path, f"has {config.num_labels} labels: which is the reward could not be told")
    return tokenizer, config


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


def unusable(path: str | Path, why: str) -> ConfigError:
    return ConfigError(
        f"reward_model.path = {path}: {why}; set a model that was saved by"
        " AutoModelForSequenceClassification with num_labels=1"
    )
