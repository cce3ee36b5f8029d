"""The state machine that every rollout engine obeys.

    ASLEEP --wake weights--> WEIGHTS --reload, fingerprint--> WEIGHTS(v) --wake kv_cache--> AWAKE(v)
           --reset prefix cache, canary--> READY(v) --sleep--> ASLEEP

Order is kept here, once, for all backends. A backend only knows how to do each verb.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

from transformers import PreTrainedTokenizerBase

from rlswitch.engines.backend import Backend, Completion, Request
from rlswitch.errors import EngineError, EngineLost, ProofError, SwitchError
from rlswitch.proof import checks as proof
from rlswitch.seeds import request_seed
from rlswitch.switch.device import resident_bytes
from rlswitch.switch.ledger import Ledger, Phase
from rlswitch.text import first_line
from rlswitch.types import Group, PolicyWeights, Prompt, Rollout, Sampling

NEWEST = 16


class State(StrEnum):
    ASLEEP = "asleep"
    WEIGHTS = "weights awake"
    """Weights mapped, no KV cache: the state that takes new weights."""
    AWAKE = "awake, not proven"
    READY = "ready"
    """The only state that may generate for training."""
    FAILED = "failed"
    """A verb raised half-way: what the engine holds is unknown, only a new backend will do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Revival:
    """What happens when an engine is lost."""

    start: Callable[[], Backend]
    """Starts another one on a device that the others have left."""
    limit: int
    """How many may be lost in a row, without a generation between them."""
    say: Callable[[str], None]


class Engine:
    """A tenant that generates. Wrong orders raise; what it generates is by a known, proven version.

    With a `revival` a lost backend is replaced: the new one is given the current version, proves it, and
    is asked for what had not been finished, with the same seeds.
    """

    def __init__(
        self,
        name: str,
        backend: Backend,
        tokenizer: PreTrainedTokenizerBase,
        ledger: Ledger,
        *,
        level: str,
        verify: str,
        tolerance: proof.Tolerance,
        own: PolicyWeights | None = None,
        revival: Revival | None = None,
    ):
        self.name = name
        self.backend = backend
        self.tokenizer = tokenizer
        self.ledger = ledger
        self.level = level
        self.verify = verify
        self.tolerance = tolerance
        self.state = State.READY
        self.revival = revival
        self.restarts = 0
        self.own = own
        """The checkpoint of a frozen engine, which it goes back to by itself; None: it serves pushes."""
        self.weights = own
        """What the engine holds; None: an unproven checkpoint, or nothing since it slept at level 2."""
        self.proven = False
        """Whether the last weights it became ready with were proven."""
        self.canary_gap = 0.0
        """Largest |difference| of a canary log-probability at the last proof."""
        self._pushes = 0
        self._newest: list[int] = []
        """The longest of the last prompts: what a prefix cache that was not reset would know best."""
        self._lost_in_a_row = 0
        self._unreleased: str | None = None

    @property
    def version(self) -> int | None:
        return self.weights.version if self.weights else None

    def acquire(self, weights: PolicyWeights | None) -> None:
        """READY with `weights`, or with what it holds or owns; nothing to do when it already is.

        Raises ProofError when the push cannot be proven, SwitchError when there is nothing to serve,
        EngineError when it is lost once too often.
        """
        if self.own is not None and weights is not None:
            raise SwitchError(f"{self.name} is frozen at {self.own.path}: call give_to without weights")
        weights = weights or self.weights or self.own
        if weights is None:
            raise SwitchError(f"{self.name} holds no published weights: call give_to with weights")
        self._persist(lambda: self._serve(weights))

    def release(self) -> None:
        """ASLEEP at the configured level; level 2 forgets the weights. A lost engine holds nothing."""
        if self.state is State.ASLEEP or self._is_lost:
            return
        self._expect(State.READY, "sleep")
        try:
            self._sleep()
        except EngineError as error:
            self._give_up(error)

    def unreleased(self) -> str | None:
        return self._unreleased

    def wake_weights(self) -> None:
        """ASLEEP -> WEIGHTS. After level 2 they are memory without meaning until `reload`."""
        self._expect(State.ASLEEP, "wake the weights")
        with self._verb("wake_weights"):
            self.backend.wake("weights")
        self.state = State.WEIGHTS

    def reload(self, weights: PolicyWeights) -> None:
        """Pushes published weights and compares fingerprints; stays in WEIGHTS."""
        self._expect(State.WEIGHTS, "reload weights")
        with self._verb("reload") as phase:
            try:
                self.backend.reload(weights.path)
            except EngineLost:
                raise
            except Exception as error:  # it lives, and would not have them
                raise proof.reload_failed(weights, error) from error
            phase.bytes = weights.nbytes
        self.weights = weights
        self._pushes += 1
        if self._must_prove():
            with self._verb("verify"):
                proof.check_fingerprint(weights, self.backend.fingerprint())

    def wake_kv_cache(self) -> None:
        """WEIGHTS -> AWAKE. The largest block comes last: it must not meet the trainer's memory."""
        self._expect(State.WEIGHTS, "wake the KV cache")
        if self.weights is None:
            raise SwitchError(f"{self.name} has woken without weights: reload published weights first")
        with self._verb("wake_kv_cache"):
            self.backend.wake("kv_cache")
        self.state = State.AWAKE

    def make_ready(self) -> None:
        """AWAKE -> READY: forgets cached prefixes of older weights, then asks the canary."""
        self._expect(State.AWAKE, "become ready")
        assert self.weights is not None
        with self._verb("reset_prefix_cache"):
            if not self.backend.reset_prefix_cache():
                raise EngineError(f"{self.name} could not reset its prefix cache: a request still holds it")
        if self._must_prove():
            with self._verb("verify"):
                self._ask_canary(self.weights)
        self.proven = self._must_prove()
        self.state = State.READY

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """`sampling.num_samples` rollouts of every prompt, each with a seed of its own."""
        num_samples = sampling.num_samples
        self._expect(State.READY, "generate")
        if self.weights is None:
            raise SwitchError(f"{self.name} holds no published weights: call give_to with weights")
        requests = [
            Request(
                token_ids=prompt.token_ids,
                seed=request_seed(sampling.seed, sampling.step, prompt.index, sample),
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
            )
            for prompt in prompts
            # The same prompt from the next pass over the data gets further samples, not the same ones.
            for sample in range(prompt.epoch * num_samples, (prompt.epoch + 1) * num_samples)
        ]
        completions = self._complete(requests)
        self._newest = max((it.token_ids for it in requests[-NEWEST:]), key=len, default=[])
        texts = self.tokenizer.batch_decode([c.token_ids for c in completions], skip_special_tokens=True)
        rows = iter(zip(completions, texts, strict=True))
        return [
            Group(
                prompt=prompt,
                rollouts=[self._rollout(prompt, i, *next(rows)) for i in range(num_samples)],
            )
            for prompt in prompts
        ]

    def forget_prefixes(self) -> None:
        """Empties the prefix cache, so that what comes next does not depend on what was asked before."""
        self._expect(State.READY, "forget prefixes")
        self.backend.reset_prefix_cache()

    def close(self) -> None:
        self.state, self.revival = State.FAILED, None
        self.backend.close()

    def metrics(self) -> dict[str, float]:
        return {
            "switch/verified": float(self.proven),
            "switch/canary_gap": self.canary_gap,
            "switch/restarts": float(self.restarts),
        }

    def _serve(self, weights: PolicyWeights) -> None:
        if self._is_lost:
            self._start_again()
        stale = weights.version != self.version
        if self.state is State.READY and not stale:
            return
        if self.state is not State.ASLEEP:
            self._expect(State.READY, "sleep")
            self._sleep()
        self.wake_weights()
        if stale:
            self.reload(weights)
        self.wake_kv_cache()
        self.make_ready()

    def _sleep(self) -> None:
        with self._verb("sleep") as phase:
            before = self._held_bytes()
            self.backend.sleep(self.level)
            phase.bytes = max(before - self._held_bytes(), 0)
        self._unreleased = self._shortfall(phase.bytes)
        self.state = State.ASLEEP
        if self.level == "2":
            self.weights = None

    def _complete(self, requests: Sequence[Request]) -> list[Completion]:
        """In the order of the requests, whatever backend has finished them."""
        completions: dict[int, Completion] = {}
        weights = self.weights
        assert weights is not None

        def go_on() -> None:
            if self._is_lost:
                with self.ledger.between("", self.name):
                    self._serve(weights)
            missing = [index for index in range(len(requests)) if index not in completions]
            finished: dict[int, Completion] = {}
            try:
                self.backend.generate([requests[index] for index in missing], finished)
            except BaseException:
                self.state = State.FAILED  # requests may still be running in it
                raise
            finally:
                completions.update((missing[index], it) for index, it in finished.items())

        self._persist(go_on)
        self._lost_in_a_row = 0
        if len(completions) != len(requests):
            raise EngineError(f"{self.name}: {len(completions)} completions for {len(requests)} requests")
        return [completions[index] for index in range(len(requests))]

    @property
    def _is_lost(self) -> bool:
        return self.state is State.FAILED and self.revival is not None

    def _persist(self, attempt: Callable[[], None]) -> None:
        """Makes the attempt again, with another backend, for as long as one may be lost."""
        while True:
            try:
                return attempt()
            except EngineError as error:
                self._give_up(error)
            except ProofError:
                self.revival = None  # it lives, and nobody knows what it holds: not to be passed over
                raise

    def _give_up(self, error: EngineError) -> None:
        """Ends what is left of the backend. Raises `error` where there will not be another one."""
        self.state = State.FAILED
        if self.revival is None:
            raise error
        self.backend.abandon()
        self.weights, self._unreleased = None, None
        self._lost_in_a_row += 1
        if self._lost_in_a_row > self.revival.limit:
            raise EngineError(
                f"{self.name} was lost {self._lost_in_a_row} times in a row, engine.max_restarts ="
                f" {self.revival.limit}; the last time: {error}"
            ) from error
        self.revival.say(f"{self.name} is lost and will be started again: {first_line(error)}")

    def _start_again(self) -> None:
        assert self.revival is not None
        with self.ledger.phase("restart"):
            self.backend = self.revival.start()
        self.restarts += 1
        self._pushes, self._newest = 0, []
        self.state = State.READY

    def _rollout(self, prompt: Prompt, sample: int, completion: Completion, text: str) -> Rollout:
        tokens, logprobs = completion.token_ids, completion.logprobs
        if not tokens or len(tokens) != len(logprobs):
            raise EngineError(
                f"{self.name}: prompt {prompt.index} sample {sample} came back with {len(tokens)} tokens and"
                f" {len(logprobs)} log-probabilities: not a rollout one can learn from"
            )
        if completion.finish_reason not in ("stop", "length"):
            raise EngineError(
                f"{self.name}: prompt {prompt.index} sample {sample} ended with '{completion.finish_reason}'"
                f" after {len(tokens)} tokens: something else controls this engine too; give the run its own"
            )
        assert self.weights is not None
        return Rollout(
            prompt=prompt,
            sample=sample,
            token_ids=tokens,
            logprobs=logprobs,
            text=text,
            finish_reason=completion.finish_reason,
            policy_version=self.weights.version,
        )

    def _ask_canary(self, weights: PolicyWeights) -> None:
        sequences = weights.canary.sequences
        asked_before = [*sequences, self._newest] if self._newest else sequences
        proof.check_prefix_cache(weights, self.backend.count_cached_tokens(asked_before))
        self.canary_gap = proof.check_canary(weights, self.backend.score(sequences), self.tolerance)
        if self._newest:
            self.backend.reset_prefix_cache()  # a run that was resumed has not asked it

    def _must_prove(self) -> bool:
        return self.verify == "every" or (self.verify == "first" and self._pushes <= 1)

    def _expect(self, state: State, verb: str) -> None:
        if self.state is not state:
            raise SwitchError(
                f"{self.name} is {self.state}: cannot {verb}, which needs it {state};"
                f" let Switch.give_to keep the order"
            )

    @contextmanager
    def _verb(self, name: str) -> Iterator[Phase]:
        try:
            with self.ledger.phase(name, self.backend.pids) as phase:
                yield phase
        except BaseException:
            self.state = State.FAILED  # half done: nothing about the engine can be relied on
            raise

    def _held_bytes(self) -> int:
        if self.ledger.device.kind == "cuda":
            return self.ledger.device.total_bytes() - self.ledger.device.free_bytes()
        return resident_bytes(self.backend.pids)

    def _shortfall(self, freed: int) -> str | None:
        due = self.backend.sleeping_bytes(self.level)
        if freed >= 0.9 * due:
            return None
        return f"sleep level {self.level} freed {freed / 2**20:.0f} of {due / 2**20:.0f} MiB"
