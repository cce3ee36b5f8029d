"""The state machine that every engine obeys.

    ASLEEP --wake weights--> WEIGHTS --reload, fingerprint--> WEIGHTS(v) --wake kv_cache--> AWAKE(v)
           --reset prefix cache, canary--> READY(v) --sleep--> ASLEEP

Backends know how to do each verb; the order is enforced here, once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import NoReturn

from transformers import PreTrainedTokenizerBase

from rlswitch.engines.backend import Backend, Completion, Request
from rlswitch.engines.rollouts import groups_from, requests_for
from rlswitch.engines.spec import EngineSpec
from rlswitch.errors import EngineError, EngineLost, SwitchError
from rlswitch.proof import checks as proof
from rlswitch.switch.ledger import Ledger, Phase
from rlswitch.types import Group, PolicyWeights, Prompt, Sampling

NEWEST = 16


class State(StrEnum):
    ASLEEP = "asleep"
    WEIGHTS = "weights awake"
    """Weights mapped, no KV cache: the state that accepts new weights."""
    AWAKE = "awake, not proven"
    READY = "ready"
    """The only state that generates."""
    FAILED = "failed"
    """A verb raised halfway, so the engine's contents are unknown; only a new backend helps."""


class Engine:
    """A tenant that generates from a known, proven version; a verb out of order raises SwitchError.

    It can only fail. `RestartingEngine` (revival.py) retries with another backend.
    """

    def __init__(
        self,
        spec: EngineSpec,
        backend: Backend,
        tokenizer: PreTrainedTokenizerBase,
        ledger: Ledger,
        tolerance: proof.Tolerance,
        base_weights: PolicyWeights | None = None,
    ):
        self.name, self.level, self.verify = spec.name, spec.level, spec.verify
        self.backend = backend
        self.tokenizer = tokenizer
        self.ledger = ledger
        self.tolerance = tolerance
        self.state = State.READY
        self.base_weights = base_weights
        """A frozen engine's own checkpoint, which it reloads by itself; None: it serves pushed versions."""
        self.weights = base_weights
        """What the engine holds; None: an unproven checkpoint, or nothing after level 2."""
        self.proven = False
        """Whether the current weights were proven."""
        self.canary_gap = 0.0
        """Largest |difference| of a canary log-probability in the last proof."""
        self._pushes = 0
        self._newest: list[int] = []
        """The longest of the newest prompts: the likeliest stale entry of a prefix cache."""
        self._unreleased: str | None = None

    @property
    def version(self) -> int | None:
        return self.weights.version if self.weights else None

    def acquire(self, weights: PolicyWeights | None) -> None:
        """READY with `weights`, or with those it holds or is frozen at; a no-op if it already is.

        Raises ProofError if the push cannot be proven, SwitchError if there is nothing to serve, EngineError
        if the backend fails.
        """
        self.serve(self.weights_to_serve(weights))

    def release(self) -> None:
        """ASLEEP at the configured level; level 2 discards the weights."""
        if self.state is not State.ASLEEP:
            self._expect(State.READY, "sleep")
            self._sleep()

    def unreleased(self) -> str | None:
        return self._unreleased

    def weights_to_serve(self, weights: PolicyWeights | None) -> PolicyWeights:
        """`weights`, or else the current or the base ones. Raises SwitchError."""
        if self.base_weights is not None and weights is not None:
            raise SwitchError(
                f"{self.name} is frozen at {self.base_weights.path}: call give_to without weights"
            )
        return weights or self.weights or self.base_weights or self._nothing_to_serve()

    def serve(self, weights: PolicyWeights) -> None:
        """ASLEEP or READY -> READY with `weights`, reloaded if they are another version."""
        stale = weights.version != self.version
        if self.state is State.READY and not stale:
            return
        self.release()
        self.wake_weights()
        if stale:
            self.reload(weights)
        self.wake_kv_cache()
        self.make_ready()

    def wake_weights(self) -> None:
        """ASLEEP -> WEIGHTS. After level 2 their memory is undefined until `reload`."""
        self._expect(State.ASLEEP, "wake the weights")
        with self._verb("wake_weights"):
            self.backend.wake("weights")
        self.state = State.WEIGHTS

    def reload(self, weights: PolicyWeights) -> None:
        """Loads published weights and compares fingerprints; stays in WEIGHTS."""
        self._expect(State.WEIGHTS, "reload weights")
        with self._verb("reload") as phase:
            try:
                self.backend.reload(weights.path)
            except EngineLost:
                raise
            except Exception as error:  # it is alive and rejects them
                raise proof.reload_failed(weights, error) from error
            phase.bytes = weights.nbytes
        self.weights = weights
        self._pushes += 1
        if self._must_prove():
            with self._verb("verify"):
                proof.check_fingerprint(weights, self.backend.fingerprint())

    def wake_kv_cache(self) -> None:
        """WEIGHTS -> AWAKE. The largest block comes last, when the trainer's memory is free."""
        self._expect(State.WEIGHTS, "wake the KV cache")
        if self.weights is None:
            raise SwitchError(f"{self.name} has woken without weights: reload published weights first")
        with self._verb("wake_kv_cache"):
            self.backend.wake("kv_cache")
        self.state = State.AWAKE

    def make_ready(self) -> None:
        """AWAKE -> READY: drops cached prefixes of older weights, then scores the canary."""
        self._expect(State.AWAKE, "become ready")
        assert self.weights is not None
        with self._verb("reset_prefix_cache"):
            if not self.backend.reset_prefix_cache():
                raise EngineError(f"{self.name} could not reset its prefix cache: a request still holds it")
        self.proven = self._must_prove()
        if self.proven:
            with self._verb("verify"):
                self._check_canary(self.weights)
        self.state = State.READY

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """`sampling.num_samples` rollouts of every prompt, each with its own seed."""
        completions: dict[int, Completion] = {}
        self.complete(requests_for(prompts, sampling), completions)
        return self.groups(prompts, completions, sampling)

    def serving(self) -> PolicyWeights:
        """The weights it is READY with. Raises SwitchError."""
        self._expect(State.READY, "generate")
        return self.weights or self._nothing_to_serve()

    def complete(self, requests: Sequence[Request], into: dict[int, Completion]) -> None:
        """Puts each completion `into` its request's index as it finishes, even if others fail."""
        self.serving()
        try:
            self.backend.generate(requests, into)
        except BaseException:
            self.state = State.FAILED  # requests may still be running in it
            raise
        self._newest = max((it.token_ids for it in requests[-NEWEST:]), key=len, default=[])

    def groups(
        self, prompts: Sequence[Prompt], completions: Mapping[int, Completion], sampling: Sampling
    ) -> list[Group]:
        """What it has completed, decoded and grouped by prompt."""
        version = self.serving().version
        return groups_from(self.name, version, prompts, completions, sampling, self.tokenizer)

    def forget_prefixes(self) -> None:
        """Empties the prefix cache, so that later output does not depend on earlier prompts."""
        self._expect(State.READY, "forget prefixes")
        self.backend.reset_prefix_cache()

    def abandon(self) -> None:
        """FAILED: ends what is left of a lost backend."""
        self.state = State.FAILED
        self.weights, self._unreleased = None, None
        self.backend.abandon()

    def adopt(self, backend: Backend) -> None:
        """FAILED -> READY on a fresh backend, which no version has been pushed to."""
        self._expect(State.FAILED, "take another backend")
        self.backend, self.state = backend, State.READY
        self._pushes, self._newest = 0, []

    def close(self) -> None:
        self.state = State.FAILED
        self.backend.close()

    def metrics(self) -> dict[str, float]:
        return {"switch/verified": float(self.proven), "switch/canary_gap": self.canary_gap}

    def _sleep(self) -> None:
        device, pids = self.ledger.device, self.backend.pids
        with self._verb("sleep") as phase:
            before = device.used_bytes(pids)
            self.backend.sleep(self.level)
            phase.bytes = max(before - device.used_bytes(pids), 0)
        due = self.backend.sleeping_bytes(self.level)
        self._unreleased = None
        if phase.bytes < 0.9 * due:
            freed = f"{phase.bytes / 2**20:.0f} of {due / 2**20:.0f} MiB"
            self._unreleased = f"sleep level {self.level} freed {freed}"
        self.state = State.ASLEEP
        if self.level == "2":
            self.weights = None

    def _check_canary(self, weights: PolicyWeights) -> None:
        sequences = weights.canary.sequences
        asked_before = [*sequences, self._newest] if self._newest else sequences
        proof.check_prefix_cache(weights, self.backend.count_cached_tokens(asked_before))
        self.canary_gap = proof.check_canary(weights, self.backend.score(sequences), self.tolerance)
        if self._newest:
            self.backend.reset_prefix_cache()  # a resumed run has not cached it

    def _must_prove(self) -> bool:
        return self.verify == "every" or (self.verify == "first" and self._pushes <= 1)

    def _nothing_to_serve(self) -> NoReturn:
        raise SwitchError(f"{self.name} holds no published weights: call give_to with weights")

    def _expect(self, state: State, verb: str) -> None:
        if self.state is not state:
            raise SwitchError(
                f"{self.name} is {self.state}: cannot {verb}, which needs it {state}; Switch.give_to keeps"
                " the order"
            )

    @contextmanager
    def _verb(self, name: str) -> Iterator[Phase]:
        try:
            with self.ledger.phase(name, self.backend.pids) as phase:
                yield phase
        except BaseException:
            self.state = State.FAILED  # half done: its contents are unknown
            raise
