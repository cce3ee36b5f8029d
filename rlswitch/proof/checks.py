"""The proof of a push: does the engine compute with the weights that the trainer published?

Three checks, each for errors that the others miss. Fingerprint: a stale, missing, truncated or mis-cast
tensor, however small the update was. Prefix cache: keys and values of older weights. Canary: bytes in the
wrong place, a stale packed copy, a wrong configuration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlswitch.errors import ProofError
from rlswitch.proof.fingerprint import checkpoint_tensors, named_fingerprints, total_fingerprint
from rlswitch.text import first_line
from rlswitch.types import PolicyWeights

LEARNED_FLOOR = 0.02
LEARNED_CEILING = 0.5


@dataclass(slots=True)
class Tolerance:
    """Largest |difference| of a canary log-probability; `limit` None: learned on the first push.

    In bfloat16 two correct kernels differ by an amount that depends on the model. The limit becomes four
    times the first push's difference, which must itself be at most LEARNED_CEILING.
    """

    limit: float | None

    def admit(self, gap: float) -> bool:
        """Whether `gap` is within the limit, which the first call may set."""
        if self.limit is None and gap <= LEARNED_CEILING:
            self.limit = min(max(4 * gap, LEARNED_FLOOR), LEARNED_CEILING)
        return self.limit is not None and gap <= self.limit


def check_fingerprint(weights: PolicyWeights, reports: Sequence[dict[str, Any]]) -> None:
    """Raises ProofError unless every worker received, and holds, exactly what was published."""
    for rank, report in enumerate(reports):
        received = total_fingerprint(report["received"].values())
        if received != weights.fingerprint:
            raise ProofError(
                f"{_push(weights)}: fingerprint: worker {rank} received {received:016x}, published was"
                f" {weights.fingerprint:016x}; {_culprits(weights, report['received'])}"
            )
        initial = weights.initial_fingerprints
        due = weights.fingerprint if initial is None else initial[rank]
        if report["live"] is not None and report["live"] != due:
            raise ProofError(
                f"{_push(weights)}: fingerprint: worker {rank} received the published weights but holds"
                f" {report['live']:016x} instead of {due or 0:016x}; the reload left parameters unchanged:"
                " upgrade vLLM, or try engine.vllm.quantization=null and switch.level=1"
            )


def check_prefix_cache(weights: PolicyWeights, cached_tokens: int) -> None:
    """Raises ProofError if the cache holds a token of prompts that older versions were given."""
    if cached_tokens:
        raise ProofError(
            f"{_push(weights)}: prefix cache: {cached_tokens} tokens would be served from keys and values"
            " of older weights; the prefix cache was not reset: reset it after every push"
        )


def check_canary(weights: PolicyWeights, logprobs: Sequence[Sequence[float]], tolerance: Tolerance) -> float:
    """The largest difference between the engine's and the trainer's log-probabilities of the canary.

    Raises ProofError where it exceeds `tolerance`.
    """
    trainer = weights.canary.logprobs
    if [len(row) for row in trainer] != [len(row) for row in logprobs]:
        raise ProofError(f"{_push(weights)}: canary: the engine scored the wrong number of tokens")
    worst, where = 0.0, ""
    for i, rows in enumerate(zip(trainer, logprobs, strict=True)):
        for t, (ours, theirs) in enumerate(zip(*rows, strict=True), start=1):
            gap = abs(ours - theirs) if math.isfinite(ours) and math.isfinite(theirs) else math.inf
            if gap > worst:
                worst, where = gap, f"sequence {i}, token {t}: {theirs:.5f}, trainer {ours:.5f}"
    if not tolerance.admit(worst):
        limit = LEARNED_CEILING if tolerance.limit is None else tolerance.limit
        raise ProofError(
            f"{_push(weights)}: canary: a log-probability differs by {worst:.3g}, limit {limit:.3g} ({where})"
            "; the right bytes are in the wrong place, or the engine uses a stale copy: try switch.level=1,"
            " engine.enforce_eager=true, or another vLLM"
        )
    return worst


def reload_failed(weights: PolicyWeights, error: Exception) -> ProofError:
    """The engine rejected a published version, and may have loaded half of it."""
    reason = first_line(error)
    return ProofError(f"{_push(weights)}: reload: the engine rejected it ({reason}); {_files(weights)}")


def _push(weights: PolicyWeights) -> str:
    if weights.initial_fingerprints is not None:
        return f"wake-up with {weights.path} is not proven"
    return f"push of version {weights.version} is not proven"


def _culprits(weights: PolicyWeights, received: dict[str, int]) -> str:
    """The tensors that differ, and whether the published files are to blame."""
    if not received:
        return "nothing was loaded: reload_weights received no tensors"
    missing = sorted(weights.tensors.keys() - received.keys())
    wrong = sorted(name for name, value in received.items() if weights.tensors.get(name, value) != value)
    if missing:
        return f"tensors missing: {', '.join(missing[:3])} ({len(missing)} in all); {_files(weights)}"
    if wrong:
        return f"tensors differ: {', '.join(wrong[:3])} ({len(wrong)} in all); {_files(weights)}"
    return f"extra tensors: {', '.join(sorted(received.keys() - weights.tensors.keys())[:3])}"


def _files(weights: PolicyWeights) -> str:
    if weights.initial_fingerprints is not None:
        return f"{weights.path} may have changed since the engine started: restart it"
    found: dict[str, int] = {}
    try:
        for name, tensor in checkpoint_tensors(weights.path):
            found |= named_fingerprints([(name, tensor)])
    except Exception as error:
        return f"the files in {weights.path} cannot be read ({error}): try switch.transport=disk"
    if total_fingerprint(found.values()) == weights.fingerprint:
        return (
            f"the files in {weights.path} are as published, so the engine loaded something else:"
            " pass weights_path with every reload"
        )
    return f"the files in {weights.path} are not what was published: try switch.transport=disk"
