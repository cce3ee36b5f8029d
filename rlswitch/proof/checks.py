"""The proof of a push: does the engine compute with the weights that the trainer published?

Three checks, each for errors that the others miss. Fingerprint: a stale, missing, truncated or mis-cast
tensor, however small the update was. Prefix cache: keys and values of older weights. Canary: bytes in the
wrong place, a stale packed copy, a wrong configuration.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlswitch.errors import ProofError
from rlswitch.proof.fingerprint import checkpoint_tensors, tensor_fingerprint, total_fingerprint
from rlswitch.text import first_line
from rlswitch.types import PolicyWeights

LEARNED_FLOOR, LEARNED_CEILING = 0.02, 0.15
"""The mean |difference| that is always allowed, and the one that never is, in nats."""
LARGEST = 2.0
"""The |difference| of one token that is never allowed, in nats: a stale head shows 2 to 4."""


@dataclass(slots=True)
class Tolerance:
    """How far canary log-probabilities, in nats, may differ between engine and trainer.

    Exact arithmetic bounds every token by `largest`. Otherwise (`largest` None) two correct kernels differ
    by an amount that depends on the model, in single tokens by a lot: the mean is judged, and one token
    only has to stay below LARGEST. The limit of the mean becomes four times the first push's mean, which
    must itself be at most LEARNED_CEILING.
    """

    largest: float | None
    mean: float | None = None
    """Without `largest`: the limit of the mean; None: learned on the first push."""

    def excess(self, gaps: Sequence[float]) -> str:
        """What exceeds its limit; empty if nothing does, and then the first call sets a missing limit."""
        worst, limit = max(gaps, default=0.0), LARGEST if self.largest is None else self.largest
        if worst > limit:
            return f"a log-probability differs by {worst:.3g}, limit {limit:.3g}"
        if self.largest is not None:
            return ""
        mean, limit = sum(gaps) / max(len(gaps), 1), LEARNED_CEILING if self.mean is None else self.mean
        if mean > limit:
            return f"log-probabilities differ by {mean:.3g} on average, limit {limit:.3g}"
        if self.mean is None:
            self.mean = min(max(4 * mean, LEARNED_FLOOR), LEARNED_CEILING)
        return ""


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
    """Raises ProofError if the cache still holds tokens of the prompts of older versions."""
    if cached_tokens:
        raise ProofError(
            f"{_push(weights)}: prefix cache: {cached_tokens} tokens would be served from keys and values"
            " of older weights: reset the prefix cache after every push"
        )


def check_canary(weights: PolicyWeights, logprobs: Sequence[Sequence[float]], tolerance: Tolerance) -> float:
    """The largest difference between the engine's and the trainer's log-probabilities of the canary.

    Raises ProofError where they differ by more than `tolerance` allows.
    """
    trainer = weights.canary.logprobs
    if [len(row) for row in trainer] != [len(row) for row in logprobs]:
        raise ProofError(f"{_push(weights)}: canary: the engine scored the wrong number of tokens")
    gaps, worst, where = [], 0.0, ""
    for i, rows in enumerate(zip(trainer, logprobs, strict=True)):
        for t, (ours, theirs) in enumerate(zip(*rows, strict=True), start=1):
            gap = abs(ours - theirs) if math.isfinite(ours) and math.isfinite(theirs) else math.inf
            gaps.append(gap)
            if gap > worst:
                worst, where = gap, f"sequence {i}, token {t}: {theirs:.5f}, trainer {ours:.5f}"
    if excess := tolerance.excess(gaps):
        raise ProofError(
            f"{_push(weights)}: canary: {excess} ({where}); the right bytes are in the wrong place, or the"
            " engine uses a stale copy: try switch.level=1, engine.enforce_eager=true, or another vLLM"
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
    for what, names in (("missing", missing), ("differ", wrong)):
        if names:
            return f"tensors {what}: {', '.join(names[:3])} ({len(names)} in all); {_files(weights)}"
    return f"extra tensors: {', '.join(sorted(received.keys() - weights.tensors.keys())[:3])}"


def _files(weights: PolicyWeights) -> str:
    if weights.initial_fingerprints is not None:
        return f"{weights.path} may have changed since the engine started: restart it"
    try:
        found = total_fingerprint(tensor_fingerprint(it) for _, it in checkpoint_tensors(weights.path))
    except Exception as error:
        return f"the files in {weights.path} cannot be read ({error}): try switch.transport=disk"
    if found == weights.fingerprint:
        return (
            f"the files in {weights.path} are as published, so the engine loaded something else:"
            " pass weights_path with every reload"
        )
    return f"the files in {weights.path} are not what was published: try switch.transport=disk"
