"""The experiment: two models take turns in each mode and answer the same prompt after each wake-up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlswitch.config.sections import ModelConfig
from rlswitch.data.hub import load_tokenizer
from rlswitch.data.prompts import encode
from rlswitch.engines.backend import Backend, Completion, Request, warm_up
from rlswitch.engines.engine import Engine
from rlswitch.engines.spec import EngineSpec, Launch
from rlswitch.engines.start import engine_on, start_backend
from rlswitch.errors import RLSwitchError
from rlswitch.proof.fingerprint import checkpoint_tensors
from rlswitch.records import jsonl as records
from rlswitch.serving.serve import frozen_spec
from rlswitch.switch.device import Device, resident_bytes
from rlswitch.switch.ledger import SWITCH, Ledger
from rlswitch.switch.switch import Switch
from rlswitch.text import first_line

from .models import limits
from .settings import ABLATIONS, RESTART, BenchSettings

BASE = "base"
WAKE = ("wake_weights", "reload", "wake_kv_cache", "reset_prefix_cache")
"""The phases of a wake-up, without the proof."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement. `what` is a phase (`value` in seconds) or a size (`value` in bytes)."""

    variant: str
    """base, or the name of an ablation."""
    transport: str
    mode: str
    """restart or a sleep level; empty for quantities that do not depend on the level."""
    model: str
    """A or B."""
    what: str
    value: float


@dataclass(kw_only=True, slots=True)
class Result:
    """All measurements, and what could not be measured."""

    samples: list[Sample] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """What was requested but not measured, and why."""
    differing: list[str] = field(default_factory=list)
    """Visits whose answer differs in its tokens from the reference."""

    def values(self, what: str, *, mode: str, model: str, transport: str = "local", variant: str = BASE):
        """All samples of one quantity, in order."""
        key = (variant, transport, mode, model, what)
        return [s.value for s in self.samples if (s.variant, s.transport, s.mode, s.model, s.what) == key]


class Experiment:
    """Runs the requested modes, one group of engines after another."""

    def __init__(self, settings: BenchSettings, models: dict[str, str], device: Device, log: Callable):
        self.settings = settings
        self.models = models
        self.device = device
        self.log = log
        self.result = Result()
        self.directory = Path(settings.output_dir)
        self.references: dict[tuple[str, str], Completion] = {}
        self.paths = {label: self._spec(label).model_path for label in models}
        self.tokenizers = {
            label: load_tokenizer(ModelConfig(path=models[label]), path) for label, path in self.paths.items()
        }
        self.baseline = device.free_bytes()

    def run(self) -> Result:
        for path in self.paths.values():  # so that every mode finds the files in the page cache
            for _ in checkpoint_tensors(Path(path)):
                pass
        settings, sleeping = self.settings, [mode for mode in self.settings.modes if mode != RESTART]
        for transport in settings.transports:
            if RESTART in settings.modes and not (sleeping and transport == "server"):
                with self._record_failure(f"{transport}, restart"):
                    self.restart(transport)
            if sleeping:
                with self._record_failure(f"{transport}, {', '.join(sleeping)}"):
                    self.take_turns(transport, BASE, sleeping)
        impossible = limits(self.device)
        for ablation in settings.ablations:
            if ablation in impossible:
                self.result.missing[ablation] = impossible[ablation]
                continue
            with self._record_failure(ablation):
                self.take_turns("local", ablation, ["1", "2"])
        return self.result

    def restart(self, transport: str) -> None:
        """The baseline without sleep: each visit starts an engine, prompts it and closes it, without warm-up.

        vLLM starts in new interpreters, as it would without rlswitch.
        """
        for visit, label in enumerate("AB" * self.settings.cycles):
            self.log(f"{transport}, restart, visit {visit + 1}: {label}")
            add = self._adder(BASE, transport, RESTART, label)
            with self._clock(add, "total"), ExitStack() as stack:
                with self._clock(add, "load"):
                    backend = self._start(transport, BASE, label, stack, fork_server=False)
                self._ask(backend, label, BASE, f"{transport}, restart, visit {visit + 1}", add)
                with self._clock(add, "close"):
                    stack.close()

    def take_turns(self, transport: str, variant: str, levels: list[str]) -> None:
        """Starts both engines once, then makes the visits, level by level."""
        with ExitStack() as stack:
            directory = self.directory / f"{variant}-{transport}"
            directory.mkdir(parents=True, exist_ok=True)
            switch = Switch(Ledger(self.device, directory))
            engines = {}
            for label in self.models:
                self.log(f"{transport}, {variant}: starting {label}")
                engines[label] = self._load(transport, variant, label, switch, stack)
            for level in levels:
                with self._record_failure(f"{transport}, {variant}, level {level}"):
                    self._visits(transport, variant, level, switch, engines)

    def _load(self, transport: str, variant: str, label: str, switch: Switch, stack: ExitStack) -> Engine:
        add = self._adder(variant, transport, "", label)
        with self._clock(add, "load"):
            backend = self._start(transport, variant, label, stack)
        with self._clock(add, "warm_up"):
            warm_up(backend, self._tokens(label)[::-1])
        self._ask(backend, label, variant, f"{transport}, {variant}, start", add)
        spec = replace(self._spec(label, variant), name=label)
        with self._clock(add, "fingerprint"):
            engine = engine_on(backend, spec, self.tokenizers[label], switch.ledger, frozen=True)
        switch.holder = engine
        switch.vacate()
        return engine

    def _visits(
        self, transport: str, variant: str, level: str, switch: Switch, engines: dict[str, Engine]
    ) -> None:
        for label, engine in engines.items():  # not measured: puts both to sleep at this level
            frozen_spec(
                self.models[label], level=level, **self._engine_settings(variant)
            )  # raises if unsupported
            switch.give_to(engine)
            engine.level = level
            switch.vacate()
        for visit, label in enumerate("AB" * self.settings.cycles):
            switch.ledger.step += 1
            where = f"{transport}, {variant}, level {level}, visit {visit + 1}"
            add = self._adder(variant, transport, level, label)
            with self._clock(add, "total"):
                switch.give_to(engines[label])
                self._ask(engines[label].backend, label, variant, where, add)
            for other in engines.keys() - {label}:
                pids = [process.pid for process in engines[other].backend.family.processes]
                self._adder(variant, transport, level, other)("asleep_host", resident_bytes(pids))
            self._phases(switch.ledger, self.directory / f"{variant}-{transport}", variant, transport, level)
        switch.ledger.step += 1
        switch.vacate()
        self._phases(switch.ledger, self.directory / f"{variant}-{transport}", variant, transport, level)
        self.log(f"{transport}, {variant}, level {level}: {2 * self.settings.cycles} visits")

    def _phases(self, ledger: Ledger, directory: Path, variant: str, transport: str, level: str) -> None:
        """Turns this visit's switch.jsonl rows into samples: sleep belongs to `from`, the rest to `to`."""
        rows = [row for row in records.read(directory / SWITCH) if row["step"] == ledger.step]
        sums: dict[tuple[str, str], float] = {}
        for row in rows:
            label = row["from" if row["phase"] == "sleep" else "to"]
            add = self._adder(variant, transport, level, label)
            for what in [row["phase"], *(["wake"] if row["phase"] in WAKE else [])]:
                sums[label, what] = sums.get((label, what), 0.0) + row["seconds"]  # verify takes two phases
            if row["phase"] == "sleep" and self.device.kind == "cuda":
                add("asleep_device", max(self.baseline - row["device_free_after"], 0))
        for (label, what), seconds in sums.items():
            self._adder(variant, transport, level, label)(what, seconds)

    def _ask(self, backend: Backend, label: str, variant: str, where: str, add: Callable) -> None:
        """Prompts twice without cached prefixes and compares both answers with the model's first one."""
        request = Request(
            self._tokens(label), seed=0, max_new_tokens=self.settings.max_new_tokens, temperature=0.0
        )
        for what in ("first", "later"):
            with self._clock(add, what):
                answers: dict[int, Completion] = {}
                backend.generate([request], answers)
            backend.reset_prefix_cache()
            answer = answers[0]
            reference = self.references.setdefault((variant, label), answer)
            if answer.token_ids != reference.token_ids:
                self.result.differing.append(f"{where}, model {label}, {what} inference")
                continue
            pairs = zip(answer.logprobs, reference.logprobs, strict=True)
            add("gap", max((abs(a - b) for a, b in pairs), default=0.0))

    def _start(self, transport: str, variant: str, label: str, stack: ExitStack, **more: bool) -> Backend:
        settings = self._engine_settings(variant) | more
        launch = Launch(
            spec=frozen_spec(self.models[label], server=transport == "server", **settings),
            tokenizer=self.tokenizers[label],
            device=self.device,
            log_path=self.directory / f"engine-{label}.log",
            scratch=self.directory / "scratch",
            warm_up=False,
        )
        backend = start_backend(launch)
        stack.callback(backend.close)
        return backend

    def _spec(self, label: str, variant: str = BASE) -> EngineSpec:
        return frozen_spec(self.models[label], **self._engine_settings(variant))

    def _engine_settings(self, variant: str) -> dict[str, Any]:
        settings = self.settings
        return {
            "dtype": settings.dtype,
            "max_model_len": settings.max_model_len,
            "kv_cache_gib": settings.kv_cache_gib,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "enforce_eager": settings.enforce_eager,
            "start_timeout_s": settings.start_timeout_s,
        } | ABLATIONS.get(variant, {})

    def _tokens(self, label: str) -> list[int]:
        return encode(self.settings.prompt, self.tokenizers[label])

    def _adder(self, variant: str, transport: str, mode: str, model: str) -> Callable[[str, float], None]:
        return lambda what, value: self.result.samples.append(
            Sample(variant, transport, mode, model, what, float(value))
        )

    @contextmanager
    def _clock(self, add: Callable[[str, float], None], what: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        add(what, time.monotonic() - began)

    @contextmanager
    def _record_failure(self, what: str) -> Iterator[None]:
        """Records an error in `missing` and continues: few machines support every mode."""
        try:
            yield
        except RLSwitchError as error:
            self.result.missing[what] = first_line(error)
            self.log(f"{what}: {self.result.missing[what]}")
