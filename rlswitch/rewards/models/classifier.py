"""The reward model as a tenant: a sequence classifier that has the device while it scores.

Between its turns the weights are in host memory (level 1) or only in their files (level 2). When they come
back they are fingerprinted like a push: a file that changed meanwhile is rejected.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlswitch.config.sections import RewardModelConfig
from rlswitch.engines.spec import engine_dtype
from rlswitch.errors import ConfigError, ProofError
from rlswitch.proof.fingerprint import named_fingerprints
from rlswitch.rewards.models.tenant import RewardTenant
from rlswitch.run import Run
from rlswitch.switch.device import Device
from rlswitch.switch.ledger import Ledger
from rlswitch.text import first_line, prompt_text
from rlswitch.training.batching import micro_batches, pad_right
from rlswitch.training.parking import nbytes
from rlswitch.types import PolicyWeights, Prompt, Rollout, Score


@dataclass(frozen=True, kw_only=True, slots=True)
class Classifier:
    """A validated classifier that is not loaded yet, and how to load it."""

    run: Run
    path: Path
    tokenizer: PreTrainedTokenizerBase
    reads_tokens: bool
    """Whether it understands the policy's tokens as they are."""
    longest: int
    """Its context length in tokens."""

    def encode(self, prompt: Prompt, token_ids: Sequence[int], text: str) -> tuple[int, ...]:
        """Prompt and completion as its tokens: the policy's, the chat template's, or the bare text's."""
        if self.reads_tokens:
            return (*prompt.token_ids, *token_ids)
        messages = prompt.messages
        if not self.tokenizer.chat_template:
            return tuple(self.tokenizer(prompt_text(messages) + text)["input_ids"])
        chat = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        if chat[-1]["role"] == "assistant":  # the completion continues it
            text = chat.pop()["content"] + text
        chat.append({"role": "assistant", "content": text})
        return tuple(self.tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False))

    def load(self, device: Device) -> PreTrainedModel:
        """The model in host memory, read from its files. Raises ConfigError where they lack a tensor."""
        dtype = getattr(torch, engine_dtype(self.run.model.dtype, device))
        try:
            model, found = AutoModelForSequenceClassification.from_pretrained(
                self.path, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise self._unusable(f"cannot be loaded: {first_line(error)}") from error
        if missing := sorted(found["missing_keys"]):
            raise self._unusable(f"has no {', '.join(missing[:3])}: its scores would be made up")
        model.config.get_text_config().use_cache = False
        return model.eval().requires_grad_(False)

    def _unusable(self, why: str) -> ConfigError:
        return ConfigError(
            f"reward_model.path = {self.path}: {why}; copy or save the model again, or set another"
        )


class RewardModel(RewardTenant):
    """Owns the classifier and moves its weights."""

    reward = "reward_model"
    name = RewardModelConfig.device_name

    def __init__(self, source: Classifier, ledger: Ledger):
        self.source, self.ledger, self.device = source, ledger, ledger.device
        self._model: PreTrainedModel | None = source.load(self.device)
        """None between its turns at level 2."""
        self._pad = self._model.config.get_text_config().pad_token_id
        self._fingerprints = self._fingerprint()
        self._nbytes = nbytes(self._tensors())
        self._parked: list[Tensor] = []
        """In host memory, at level 1."""
        if source.run.reward_model.level == "1":
            for tensor in self._tensors():
                tensor.data = tensor.data.pin_memory() if self.device.kind == "cuda" else tensor.data
                self._parked.append(tensor.data)
        self._awake = False
        self._turns = 0
        self._left_behind = 0
        self.acquire(None)

    def acquire(self, weights: PolicyWeights | None) -> None:
        """Moves the weights to the device and proves that they are those of the start. Raises ProofError."""
        if self._awake:
            return
        with self.ledger.phase("reload" if self._model is None else "onload", self.pids) as phase:
            if self._model is None:
                self._model = self.source.load(self.device)
            for tensor in self._tensors():
                tensor.data = tensor.data.to(self.device.torch, non_blocking=True)
            if self.device.kind == "cuda":
                torch.cuda.synchronize()
            phase.bytes = self._nbytes
        self._turns += 1
        verify = self.source.run.switch.verify
        if verify == "every" or (verify == "first" and self._turns == 1):
            with self.ledger.phase("verify", self.pids):
                self._prove()
        self._awake = True

    def release(self) -> None:
        if not self._awake:
            return
        with self.ledger.phase("offload", self.pids) as phase:
            before = self._on_gpu()
            if not self._parked:
                self._model = None
            else:  # nothing to copy: the weights in host memory have not changed
                for tensor, parked in zip(self._tensors(), self._parked, strict=True):
                    tensor.data = parked
            self.device.reclaim()
            phase.bytes = self._nbytes
        self._left_behind = self._nbytes - (before - self._on_gpu()) if before else 0
        self._awake = False

    def unreleased(self) -> str | None:
        if self._left_behind <= 0.1 * self._nbytes:
            return None
        return f"{self._left_behind / 2**20:.0f} of {self._nbytes / 2**20:.0f} MiB are still on the GPU"

    @property
    def pids(self) -> list[int]:
        return [os.getpid()]

    def close(self) -> None:
        self._model, self._parked = None, []

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        rows = [self.source.encode(it.prompt, it.token_ids, it.text) for it in rollouts]
        # Equal rows once: a difference in the last bit would be magnified when advantages are normalised.
        fitting = [row for row in dict.fromkeys(rows) if len(row) <= self.source.longest]
        logits = dict(zip(fitting, self._logits(fitting), strict=True))
        return [self._as_score(row, logits) for row in rows]

    def _as_score(self, row: tuple[int, ...], logits: dict[tuple[int, ...], float]) -> Score:
        if row not in logits:
            return Score(error=f"has {len(row)} tokens to read, its context is {self.source.longest}")
        return Score(value=logits[row]) if math.isfinite(logits[row]) else Score(error=f"gave {logits[row]}")

    @torch.no_grad()
    def _logits(self, rows: Sequence[tuple[int, ...]]) -> list[float]:
        assert self._awake and self._model is not None, "it scores only while it has the device"
        logits = torch.zeros(len(rows))
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
        for index in micro_batches(lengths, self.source.run.trainer.micro_batch_tokens):
            chosen = [rows[i] for i in index.tolist()]
            tokens = pad_right(chosen, self._padding(chosen), torch.long).to(self.device.torch)
            mask = pad_right([[1] * len(row) for row in chosen], 0, torch.long).to(self.device.torch)
            scores = self._model(input_ids=tokens, attention_mask=mask).logits
            logits[index] = scores.squeeze(-1).float().cpu()
        return logits.tolist()

    def _padding(self, rows: Sequence[tuple[int, ...]]) -> int:
        """The model's padding token; if it has none, a token that is in no row.

        transformers' classifiers score at the last token that is not padding, which they find by its id.
        """
        assert self._model is not None
        if self._pad is not None and self._pad >= 0:
            return self._pad
        used = set(chain.from_iterable(rows))
        self._model.config.get_text_config().pad_token_id = unused = next(i for i in count() if i not in used)
        return unused

    def _prove(self) -> None:
        found = self._fingerprint()
        if wrong := sorted(name for name, value in self._fingerprints.items() if found.get(name) != value):
            raise ProofError(
                f"wake-up of the reward model is not proven: fingerprint: tensors differ:"
                f" {', '.join(wrong[:3])} ({len(wrong)} in all); {self.source.path} may have changed since"
                " the run started; start the run again"
            )

    def _fingerprint(self) -> dict[str, int]:
        assert self._model is not None
        named = chain(self._model.named_parameters(), self._model.named_buffers())
        return named_fingerprints((name, tensor.to(self.device.torch)) for name, tensor in named)

    def _tensors(self) -> Iterator[Tensor]:
        assert self._model is not None
        yield from self._model.parameters()
        yield from self._model.buffers()

    def _on_gpu(self) -> int:
        return torch.cuda.memory_allocated() if self.device.kind == "cuda" else 0
