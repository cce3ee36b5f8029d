"""The reward model as a tenant: it gives transformers' logits, and its weights are restored or rejected."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rlswitch.recipes.addition.task import build_tokenizer
from safetensors.torch import load_file, save_file
from samples import save_classifier
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)

from rlswitch.errors import ConfigError, ProofError
from rlswitch.rewards.models.classifier import Classifier, RewardModel
from rlswitch.rewards.models.reward_model import find_classifier
from rlswitch.run import Run
from rlswitch.switch.device import Device
from rlswitch.switch.ledger import Ledger
from rlswitch.types import Prompt, Rollout

pytestmark = pytest.mark.slow

PAD, EOS = 12, 14
TEMPLATE = "{% for m in messages %}{{ m['content'] }}+{% endfor %}"
COMPLETIONS = ["046", "1", "12345678", "046", "999"]


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    save_classifier(tmp_path / "classifier")
    return tmp_path / "classifier"


@pytest.fixture
def find(make_run) -> Callable[..., Classifier]:
    """find(path, level="2"): the model at `path`, inspected for a run."""

    def look(path: Path, level: str = "1", **settings) -> Classifier:
        run: Run = make_run(reward_model={"path": str(path), "level": level}, **settings)
        return find_classifier(run, [], build_tokenizer(), print)

    return look


@pytest.fixture
def start(find, tmp_path: Path) -> Callable[..., RewardModel]:
    """start(path, level="2"): a reward model that holds the device."""
    ledger = Ledger(Device("cpu"), tmp_path)
    return lambda path, level="1", **settings: RewardModel(find(path, level, **settings), ledger)


def rollouts(*texts: str, prompt: str = "12+34=") -> list[Rollout]:
    tokenizer = build_tokenizer()
    asked = Prompt(index=0, messages=prompt, token_ids=tokenizer(prompt)["input_ids"])
    return [
        Rollout(
            prompt=asked,
            sample=sample,
            token_ids=[*tokenizer(text, add_special_tokens=False)["input_ids"], EOS],
            logprobs=[],
            text=text,
            finish_reason="stop",
            policy_version=0,
        )
        for sample, text in enumerate(texts)
    ]


def scores(model: RewardModel, *texts: str) -> list[float]:
    return [score.value for score in model.score(rollouts(*texts))]


def own_logits(path: Path, *texts: str) -> list[float]:
    """transformers' scores, one sequence at a time, without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    rows = [[*it.prompt.token_ids, *it.token_ids] for it in rollouts(*texts)]
    with torch.no_grad():
        return [float(model(input_ids=torch.tensor([row])).logits) for row in rows]


# -- scoring -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [PAD, EOS, None])
@pytest.mark.parametrize("budget", [1, 24, 10_000])
def test_scores_are_transformers_own_logits_whatever_the_padding(tmp_path, start, pad, budget):
    path = tmp_path / "model"
    save_classifier(path, pad_token_id=pad)
    found = scores(start(path, trainer={"micro_batch_tokens": budget}), *COMPLETIONS)
    assert found == pytest.approx(own_logits(path, *COMPLETIONS), abs=1e-5)
    assert len({round(score, 3) for score in found}) == 4


def test_equal_rollouts_get_equal_scores_to_the_last_bit(classifier, start):
    first, *_, fourth, _ = scores(start(classifier, trainer={"micro_batch_tokens": 24}), *COMPLETIONS)
    assert first == fourth


def test_an_encoder_is_a_reward_model_as_well(tmp_path: Path, start):
    config = BertConfig(
        vocab_size=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        num_labels=1,
        initializer_range=0.2,
        pad_token_id=PAD,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    build_tokenizer().save_pretrained(tmp_path / "bert")
    found = scores(start(tmp_path / "bert"), *COMPLETIONS)
    assert found == pytest.approx(own_logits(tmp_path / "bert", *COMPLETIONS), abs=1e-5)


def test_what_does_not_fit_its_context_is_an_error_and_not_cut(classifier, start):
    fits, long = start(classifier).score(rollouts("046", "1" * 60))
    assert fits.value is not None and long.value is None
    assert long.error == "has 68 tokens to read, its context is 64"


def test_a_score_that_is_no_number_is_an_error(classifier, start):
    tensors = load_file(classifier / "model.safetensors")
    tensors["score.weight"].fill_(math.nan)
    save_file(tensors, classifier / "model.safetensors", metadata={"format": "pt"})
    (score,) = start(classifier).score(rollouts("046"))
    assert (score.value, score.error) == (None, "gave nan")


def test_another_tokenizer_reads_the_text_and_a_chat_template_is_kept(classifier, find):
    candidate = find(classifier)
    (rollout,) = rollouts("046")
    read = lambda it: candidate.tokenizer.decode(it.encode(rollout.prompt, rollout.token_ids, rollout.text))  # noqa: E731
    assert read(candidate) == "<bos>12+34=046<eos>"  # the very tokens
    other = replace(candidate, reads_tokens=False)
    assert read(other) == "<bos>12+34=046"
    other.tokenizer.chat_template = TEMPLATE
    assert read(other) == "12+34=+046+"
    rollout.prompt.messages = [{"role": "user", "content": "1="}, {"role": "assistant", "content": "0"}]
    assert read(other) == "1=+0046+"


def test_tokenizers_agree_by_vocabulary_and_template(classifier, find):
    assert find(classifier).reads_tokens
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(classifier)
    assert not find(classifier).reads_tokens


# -- as a tenant -------------------------------------------------------------------------------


def phases(tmp_path: Path) -> list[str]:
    return [json.loads(line)["phase"] for line in (tmp_path / "switch.jsonl").open()]


@pytest.mark.parametrize(("level", "way"), [("1", "onload"), ("2", "reload")])
def test_it_comes_back_with_the_same_scores_and_proven(classifier, start, tmp_path, level, way):
    model = start(classifier, level)
    before = scores(model, *COMPLETIONS)
    for _ in range(2):
        model.release()
        model.release()
        assert model.unreleased() is None
        with pytest.raises(AssertionError):
            model.score(rollouts("046"))
        model.acquire(None)
        model.acquire(None)
        assert scores(model, *COMPLETIONS) == before
    assert phases(tmp_path) == ["onload", "verify", *["offload", way, "verify"] * 2]


@pytest.mark.parametrize(("verify", "times"), [("every", 3), ("first", 1), ("off", 0)])
def test_it_is_proven_as_often_as_asked(classifier, start, tmp_path, verify: str, times: int):
    model = start(classifier, "2", switch={"verify": verify})
    for _ in range(2):
        model.release()
        model.acquire(None)
    assert phases(tmp_path).count("verify") == times


def test_a_file_that_changed_meanwhile_is_refused(classifier, start):
    model = start(classifier, "2")
    model.release()
    tensors = load_file(classifier / "model.safetensors")
    tensors["score.weight"][0, 0] += 1e-6
    save_file(tensors, classifier / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ProofError, match=r"tensors differ: score\.weight \(1 in all\).*may have changed"):
        model.acquire(None)


def test_weights_that_changed_in_host_memory_are_refused(classifier, start):
    model = start(classifier, "1")
    model.release()
    with torch.no_grad():
        model._model.score.weight[0, 0] += 1e-6
    with pytest.raises(ProofError, match=r"score\.weight"):
        model.acquire(None)


# -- rejected models ---------------------------------------------------------------------------


def test_a_language_model_is_refused_before_it_is_loaded(tiny_model, find):
    with pytest.raises(
        ConfigError, match=r"reward_model\.path = .*no sequence classifier \(Qwen3ForCausalLM\)"
    ):
        find(tiny_model().path)


def test_more_than_one_label_is_refused(tmp_path: Path, find):
    save_classifier(tmp_path / "three", num_labels=3)
    with pytest.raises(ConfigError, match="has 3 labels: which is the reward"):
        find(tmp_path / "three")


def test_no_such_model_is_one_line(tmp_path: Path, find):
    for path in (tmp_path / "nowhere", "builtin:addition-rewardmodel"):
        with pytest.raises(ConfigError, match=rf"^reward_model\.path = {path}: ") as caught:
            find(path)
        assert len(caught.value.problems) == 1


def test_a_checkpoint_without_its_head_is_refused(classifier, start):
    tensors = load_file(classifier / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, classifier / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"has no score\.weight: its scores would be made up"):
        start(classifier)
