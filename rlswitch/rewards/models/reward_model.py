"""The reward `reward_model`: the one logit that a sequence classifier gives to prompt and completion.

Here its directory is checked; classifier.py loads the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlswitch.config.sections import ModelConfig
from rlswitch.data.hub import context_of, load_tokenizer, read_config, resolve_model
from rlswitch.errors import ConfigError
from rlswitch.rewards.models.tenant import Log, StartTenant, TenantSpec
from rlswitch.run import Run
from rlswitch.types import Prompt

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from rlswitch.rewards.models.classifier import Classifier


def check_reward_model(
    run: Run, path: str, prompts: Sequence[Prompt]
) -> tuple[PreTrainedTokenizerBase, PretrainedConfig]:
    """Tokenizer and configuration of the classifier in `path`. Raises ConfigError unless it has one label."""
    assert run.reward_model.path is not None, "command/checks.py requires it"
    model = ModelConfig(path=run.reward_model.path)
    tokenizer = load_tokenizer(model, path, "reward_model.path")
    config = read_config(model, path, "reward_model.path")
    kinds = config.architectures or []
    if not any("SequenceClassification" in kind for kind in kinds):
        why = f"is no sequence classifier ({', '.join(kinds)}): its scores would be made up"
    elif config.num_labels != 1:
        why = f"has {config.num_labels} labels: which is the reward could not be told"
    else:
        return tokenizer, config
    raise ConfigError(
        f"reward_model.path = {model.path}: {why}; set a model that was saved by"
        " AutoModelForSequenceClassification with num_labels=1"
    )


def find_classifier(
    run: Run, prompts: Sequence[Prompt], policy: PreTrainedTokenizerBase, log: Log
) -> Classifier:
    """The model that reward_model.path names, not loaded yet. Raises ConfigError."""
    from rlswitch.rewards.models.classifier import Classifier  # loads torch

    assert run.reward_model.path is not None, "command/checks.py requires it"
    path = resolve_model(ModelConfig(path=run.reward_model.path), log, "reward_model.path")
    tokenizer, config = check_reward_model(run, path, prompts)
    limit = context_of(config) or tokenizer.model_max_length
    same_vocabulary = policy.get_vocab() == tokenizer.get_vocab()
    return Classifier(
        run=run,
        path=Path(path),
        tokenizer=tokenizer,
        reads_tokens=same_vocabulary and policy.chat_template == tokenizer.chat_template,
        longest=min(limit, tokenizer.model_max_length),
    )


def prepare_reward_model(
    run: Run, prompts: Sequence[Prompt], policy: PreTrainedTokenizerBase, log: Log
) -> StartTenant:
    from rlswitch.rewards.models.classifier import RewardModel  # loads torch

    classifier = find_classifier(run, prompts, policy, log)
    return lambda ledger, *_: RewardModel(classifier, ledger)


SPEC = TenantSpec(check=check_reward_model, prepare=prepare_reward_model)
