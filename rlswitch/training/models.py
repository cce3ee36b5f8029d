"""The trainer's networks and what is read off them: log-probabilities, entropies, values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from rlswitch.config.sections import ModelConfig
from rlswitch.data.hub import check_fits_context, read_config, unreadable
from rlswitch.errors import ConfigError
from rlswitch.run import Run
from rlswitch.text import first_line
from rlswitch.training import lora
from rlswitch.training.batching import completion_tokens, lay_out
from rlswitch.types import Batch

LOGITS_AT_ONCE = 1 << 26  # logits handled at once: bounds the float32 copies to 256 MiB


class Critic(nn.Module):
    """A value model: the policy's backbone with a scalar head that starts at zero."""

    def __init__(self, backbone: nn.Module, packed: bool):
        super().__init__()
        self.backbone, self.packed = backbone, packed
        self.head = nn.Linear(lora.base_of(backbone).config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch) -> Tensor:
        """Value [B, T] of the state before each completion token."""
        layout = lay_out(batch, self.packed)
        hidden = self.backbone(**layout.inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        with torch.autocast(hidden.device.type, enabled=False):  # bfloat16 would round every value
            values = self.head(hidden[layout.positions].float()).squeeze(-1)
        return layout.spread(values, batch)


def outline(
    model: ModelConfig, path: str, key: str = "model.path", kind: Any = AutoModelForCausalLM
) -> PreTrainedModel:
    """The model that `key` names on the meta device: names and shapes, no weights. Raises ConfigError."""
    config = read_config(model, path, key)
    try:
        with torch.device("meta"):
            return kind.from_config(
                config,
                attn_implementation=model.attn_implementation,
                trust_remote_code=model.trust_remote_code,
            )
    except Exception as error:  # whatever a configuration or a model's own code comes up with
        if model.attn_implementation and (
            isinstance(error, ImportError) or "attn_implementation" in str(error)
        ):
            raise _unfit_attention(model, first_line(error)) from error
        raise unreadable(model, key, error) from error


def refuse_unfit_model(run: Run, path: str) -> None:
    """Raises ConfigError for what could not be built once the engine has started, adapters included."""
    model = outline(run.model, path)
    check_fits_context(run, model.config)
    if run.model.lora_rank:
        lora.add_adapters(model, run.model, path, causal=True)


def load_policy(config: ModelConfig, path: str, frozen_dtype: torch.dtype) -> nn.Module:
    """The causal language model in float32: bfloat16 alone would lose updates at small learning rates.

    With LoRA the weights themselves are never updated: they are in `frozen_dtype`, the adapters in float32.
    """
    if config.lora_rank == 0:
        return load_causal(config, path, torch.float32)
    return lora.add_adapters(load_causal(config, path, frozen_dtype), config, path, causal=True)


def load_causal(config: ModelConfig, path: str, dtype: torch.dtype) -> PreTrainedModel:
    return _load(AutoModelForCausalLM, config, path, dtype)


def load_critic(config: ModelConfig, path: str, frozen_dtype: torch.dtype, packed: bool) -> Critic:
    """A value model as load_policy loads the policy: with LoRA only adapters and head are trained."""
    if config.lora_rank == 0:
        return Critic(_load(AutoModel, config, path, torch.float32), packed)
    backbone = _load(AutoModel, config, path, frozen_dtype)
    return Critic(lora.add_adapters(backbone, config, path, causal=False), packed)


def refuse_leaky_packing(model: nn.Module, sequences: list[list[int]], tolerance: float) -> None:
    """Raises ConfigError when packed rollouts influence each other: recurrent layers may not tell them apart.

    `sequences` are scored alone and behind one another; a log-probability may differ by `tolerance`.
    """
    alone = sequence_logprobs(model, sequences)
    tokens = torch.tensor([[token for row in sequences for token in row]])
    positions = torch.tensor([[place for row in sequences for place in range(len(row))]])
    device = next(model.parameters()).device
    with torch.no_grad():
        logits = model(
            input_ids=tokens.to(device), position_ids=positions.to(device), use_cache=False
        ).logits[0]
    start, gap = 0, 0.0
    for sequence, expected in zip(sequences, alone, strict=True):
        rows, targets = logits[start : start + len(sequence) - 1], torch.tensor(sequence[1:], device=device)
        found, _ = token_statistics(rows, targets, 1.0)
        gap = max(gap, float((found - torch.tensor(expected, device=device)).abs().max()))
        start += len(sequence)
    if not gap <= tolerance:
        raise ConfigError(
            f"trainer.packing = true: this model's log-probabilities differ by {gap:.3g} when rollouts are"
            " packed into one row: its layers do not tell them apart, they would learn from each other;"
            " set trainer.packing=false"
        )


def policy_logprobs(
    model: nn.Module, batch: Batch, temperature: float, packed: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of each completion token, both [B, T], zero on padding.

    Taken at the sampling temperature, as the engine reports them with processed_logprobs.
    """
    layout = lay_out(batch, packed)
    width = layout.inputs["input_ids"].shape[1]
    # The logits of prompts are never looked at: packed, only those of completions are computed.
    keep = layout.positions if packed else width - int(batch.prompt_lengths.min()) + 1
    logits = model(**layout.inputs, logits_to_keep=keep, use_cache=False).logits
    if logits.shape[1] == width:  # all: a model that ignores logits_to_keep
        chosen = logits.flatten(0, 1)[layout.positions]  # [N, V]
    elif packed:
        chosen = logits[0]
    else:
        chosen = logits[layout.rows, layout.positions % width - (width - logits.shape[1])]
    targets = completion_tokens(batch)[layout.rows, layout.columns]
    logprobs, entropy = token_statistics(chosen, targets, temperature)
    return layout.spread(logprobs, batch), layout.spread(entropy, batch)


def token_statistics(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy [N] of softmax(logits [N, V] / temperature), in float32.

    With a large vocabulary it works in chunks and recomputes them in the backward pass.
    """
    rows = max(LOGITS_AT_ONCE // logits.shape[-1], 1)
    if logits.shape[0] <= rows:
        return _statistics(logits, targets, temperature)
    parts = [
        checkpoint(_statistics, *chunk, temperature, use_reentrant=False)
        for chunk in zip(logits.split(rows), targets.split(rows), strict=True)
    ]
    logprobs, entropy = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropy)


def sequence_logprobs(model: nn.Module, sequences: list[list[int]]) -> list[list[float]]:
    """Log-probability of every token after the first, at temperature 1, sequence by sequence."""
    device = next(model.parameters()).device
    result = []
    for sequence in sequences:
        tokens = torch.tensor([sequence], device=device)
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[0, :-1]
        logprobs, _ = token_statistics(logits, tokens[0, 1:], 1.0)
        result.append(logprobs.tolist())
    return result


def _statistics(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    scaled = logits.float() / temperature
    normaliser = scaled.logsumexp(-1)
    logprobs = scaled.gather(-1, targets[:, None]).squeeze(-1) - normaliser
    entropy = normaliser - (scaled.softmax(-1) * scaled).sum(-1)
    return logprobs, entropy


def _load(auto_class: Any, config: ModelConfig, path: str, dtype: torch.dtype) -> PreTrainedModel:
    try:
        return auto_class.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=config.attn_implementation,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,  # a pickle could run code while it loads
        )
    except ImportError as error:  # flash_attention_2 without its package
        raise _unfit_attention(config, first_line(error)) from error
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"model.path = {path}: cannot be loaded: {reason}; set a directory or hub id with"
            " config.json and *.safetensors"
        ) from error


def _unfit_attention(config: ModelConfig, reason: str) -> ConfigError:
    return ConfigError(
        f"model.attn_implementation = {config.attn_implementation}: {reason}; install it, or set null"
    )


def checkpoint_gradients(model: nn.Module) -> None:
    """Activations are computed again instead of kept; in training mode, so it may not have any dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):  # for torch.nn.functional.dropout, and layerdrop
                setattr(module, name, 0.0)
    base = lora.base_of(model)
    base.gradient_checkpointing_enable()
    if base is not model:
        base.enable_input_require_grads()  # frozen embeddings would cut the adapters' gradients off
