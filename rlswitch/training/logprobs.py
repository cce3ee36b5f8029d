"""Log-probabilities and entropies of tokens under a causal language model."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlswitch.errors import ConfigError
from rlswitch.training.batching import lay_out
from rlswitch.types import Batch

LOGITS_AT_ONCE = 1 << 26  # logits handled at once: bounds the float32 copies to 256 MiB


def policy_logprobs(
    model: nn.Module, batch: Batch, temperature: float, packed: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of each learned token, both [B, T], zero off the loss mask.

    At the sampling temperature, like the engine's (processed_logprobs).
    """
    layout = lay_out(batch, packed)
    width = layout.inputs["input_ids"].shape[1]
    # The logits of prompts are not needed; packed, only those of learned tokens are computed.
    keep = layout.positions if packed else width - int(batch.prompt_lengths.min()) + 1
    logits = model(**layout.inputs, logits_to_keep=keep, use_cache=False).logits
    if logits.shape[1] == width:  # the model ignores logits_to_keep
        chosen = logits.flatten(0, 1)[layout.positions]  # [N, V]
    elif packed:
        chosen = logits[0]
    else:
        chosen = logits[layout.rows, layout.positions % width - (width - logits.shape[1])]
    logprobs, entropy = token_statistics(chosen, layout.targets, temperature)
    return layout.spread(logprobs, batch), layout.spread(entropy, batch)


def token_statistics(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy [N] of softmax(logits [N, V] / temperature), in float32.

    Large inputs are processed in chunks that the backward pass recomputes.
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


def _statistics(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    scaled = logits.float() / temperature
    normaliser = scaled.logsumexp(-1)
    logprobs = scaled.gather(-1, targets[:, None]).squeeze(-1) - normaliser
    entropy = normaliser - (scaled.softmax(-1) * scaled).sum(-1)
    return logprobs, entropy


def sequence_logprobs(model: nn.Module, sequences: list[list[int]]) -> list[list[float]]:
    """Log-probability of every token after the first at temperature 1, one sequence at a time."""
    device = next(model.parameters()).device
    result = []
    for sequence in sequences:
        tokens = torch.tensor([sequence], device=device)
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[0, :-1]
        logprobs, _ = token_statistics(logits, tokens[0, 1:], 1.0)
        result.append(logprobs.tolist())
    return result


def check_packing(model: nn.Module, sequences: list[list[int]], tolerance: float) -> None:
    """Raises ConfigError when packed rollouts influence each other, as in recurrent layers they may.

    The log-probabilities of `sequences`, one at a time and packed, may differ by `tolerance`.
    """
    device = next(model.parameters()).device
    rows = [torch.tensor(row, device=device) for row in sequences]
    places = torch.cat([torch.arange(len(row), device=device) for row in sequences])
    with torch.no_grad():
        logits = model(input_ids=torch.cat(rows)[None], position_ids=places[None], use_cache=False).logits[0]
    gaps = []
    parts = logits.split([len(row) for row in sequences])
    for row, part, alone in zip(rows, parts, sequence_logprobs(model, sequences), strict=True):
        packed, _ = token_statistics(part[:-1], row[1:], 1.0)
        gaps.append(float((packed - torch.tensor(alone, device=device)).abs().max()))
    if not all(gap <= tolerance for gap in gaps):
        raise ConfigError(
            f"trainer.packing = true: this model's log-probabilities change by {max(gaps):.3g} when rollouts"
            " are packed into one row: its layers mix them, and they would learn from each other; set"
            " trainer.packing=false"
        )
