"""The state machine that every engine obeys.

    ASLEEP --wake weights--> WEIGHTS --reload, fingerprint--> WEIGHTS(v) --wake kv_cache--> AWAKE(v)
           --reset prefix cache, canary--> READY(v) --sleep--> ASLEEP

Backends know how to do each verb; the order is enforced here, once for all of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum

from transformers import PreTrainedTokenizerBase

from rlswitch.engines.backend import Backend, Completion, Request
from rlswitch.engines.spec import EngineSpec
from rlswitch.errors import EngineError, EngineLost, SwitchError
from rlswitch.proof import checks as proof
from rlswitch.seeds import request_seed
from rlswitch.switch.ledger import Ledger, Phase
from rlswitch.types import Group, PolicyWeights, Prompt, Rollout, Sampling

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
        self.backend, self.tokenizer = backend, tokenizer
        self.ledger, self.tolerance = ledger, tolerance
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

        Raises ProofError if they cannot be proven, SwitchError if there are none, EngineError.
        """
        self.serve(self.weights_to_serve(weights))

    def release(self) -> None:
        """ASLEEP at the configured level; level 2 discards the weights."""
        if self.state is State.ASLEEP:
            return
        self._expect(State.READY, "sleep")
        device, pids = self.ledger.device, self.backend.pids
        with self._verb("sleep") as phase:
            before = device.used_bytes(pids)
            self.backend.sleep(self.level)
            phase.bytes = max(before - device.used_bytes(pids), 0)
        due = self.backend.sleeping_bytes(self.level)
        freed = f"sleep level {self.level} freed {phase.bytes / 2**20:.0f} of {due / 2**20:.0f} MiB"
        self._unreleased = freed if phase.bytes < 0.9 * due else None
        self.state = State.ASLEEP
        if self.level == "2":
            self.weights = None

    def unreleased(self) -> str | None:
        return self._unreleased

    def weights_to_serve(self, weights: PolicyWeights | None) -> PolicyWeights:
        """`weights`, or else the current or the base ones. Raises SwitchError."""
        if self.base_weights is not None and weights is not None:
            raise SwitchError(
                f"{self.name} is frozen at {self.base_weights.path}: call give_to without weights"
            )
        found = weights or self.weights or self.base_weights
        if found is None:
            raise SwitchError(f"{self.name} holds no published weights: call give_to with weights")
        return found

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
        self.complete(prompts, sampling, completions)
        return self.groups(prompts, sampling, completions)

    def serving(self) -> PolicyWeights:
        """The weights it is READY with. Raises SwitchError."""
        self._expect(State.READY, "generate")
        return self.weights_to_serve(None)

    def complete(
        self, prompts: Sequence[Prompt], sampling: Sampling, completions: dict[int, Completion]
    ) -> None:
        """Adds the missing `completions`, by request index, as they finish, even if others fail."""
        self.serving()
        requests = requests_for(prompts, sampling)
        missing = [index for index in range(len(requests)) if index not in completions]
        finished: dict[int, Completion] = {}
        try:
            self.backend.generate([requests[index] for index in missing], finished)
        except BaseException:
            self.state = State.FAILED  # requests may still be running in it
            raise
        finally:
            completions |= {missing[index]: it for index, it in finished.items()}
        newest = (requests[index].token_ids for index in missing[-NEWEST:])
        self._newest = max(newest, key=len, default=[])

    def groups(
        self, prompts: Sequence[Prompt], sampling: Sampling, completions: Mapping[int, Completion]
    ) -> list[Group]:
        """The `completions` of all requests, decoded and grouped by prompt.

        Raises EngineError if one is missing or not a rollout.
        """
        version, size = self.serving().version, sampling.num_samples
        if len(completions) != len(prompts) * size:
            raise EngineError(
                f"{self.name}: {len(completions)} completions for {len(prompts) * size} requests"
            )
        ordered = [completions[index] for index in range(len(completions))]
        texts = self.tokenizer.batch_decode([it.token_ids for it in ordered], skip_special_tokens=True)
        groups = [Group(prompt=prompt, rollouts=[]) for prompt in prompts]
        for index, (completion, text) in enumerate(zip(ordered, texts, strict=True)):
            rollout = Rollout(
                prompt=prompts[index // size],
                sample=index % size,
                token_ids=completion.token_ids,
                logprobs=completion.logprobs,
                text=text,
                finish_reason=completion.finish_reason,
                policy_version=version,
            )
            _check_rollout(self.name, rollout)
            groups[index // size].rollouts.append(rollout)
        return groups

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

    def _check_canary(self, weights: PolicyWeights) -> None:
        sequences = weights.canary.sequences
        asked_before = [*sequences, self._newest] if self._newest else sequences
        proof.check_prefix_cache(weights, self.backend.count_cached_tokens(asked_before))
        self.canary_gap = proof.check_canary(weights, self.backend.score(sequences), self.tolerance)
        if self._newest:
            self.backend.reset_prefix_cache()  # a resumed run has not cached it

    def _must_prove(self) -> bool:
        return self.verify == "every" or (self.verify == "first" and self._pushes <= 1)

    def _expect(self, state: State, verb: str) -> None:
        if self.state is not state:
            raise SwitchError(f"{self.name} is {self.state}: cannot {verb}; use Switch.give_to")

    @contextmanager
    def _verb(self, name: str) -> Iterator[Phase]:
        try:
            with self.ledger.phase(name, self.backend.pids) as phase:
                yield phase
        except BaseException:
            self.state = State.FAILED  # half done: its contents are unknown
            raise


def requests_for(prompts: Sequence[Prompt], sampling: Sampling) -> list[Request]:
    """`sampling.num_samples` requests per prompt, each with its own seed."""
    size = sampling.num_samples
    return [
        Request(
            token_ids=prompt.token_ids,
            seed=request_seed(sampling.seed, sampling.step, prompt.index, sample),
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
        )
        for prompt in prompts
        # In its next epoch a prompt continues the numbering, so it gets new samples.
        for sample in range(prompt.epoch * size, (prompt.epoch + 1) * size)
    ]


def _check_rollout(engine: str, rollout: Rollout) -> None:
    tokens, logprobs = len(rollout.token_ids), len(rollout.logprobs)
    where = f"{engine}: prompt {rollout.prompt.index} sample {rollout.sample}"
    if not tokens or tokens != logprobs:
        raise EngineError(f"{where} came back with {tokens} tokens and {logprobs} log-probabilities")
    if rollout.finish_reason not in ("stop", "length"):
        raise EngineError(
            f"{where} ended with '{rollout.finish_reason}' after {tokens} tokens: another client controls"
            " this engine too; start one for this run alone"
        )
