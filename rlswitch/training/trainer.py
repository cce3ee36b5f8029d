"""The trainer: policy, critic and reference under accelerate. A tenant of the switch like any engine.

It never learns which algorithm it runs: it asks the algorithm for advantages and per-token losses.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlswitch.algorithms.base import Memory
from rlswitch.algorithms.losses import token_weights, value_loss, weighted_sum
from rlswitch.algorithms.mismatch import mismatch_metrics
from rlswitch.errors import RLSwitchError, SwitchError
from rlswitch.run import Run
from rlswitch.seeds import request_seed
from rlswitch.switch.device import Device
from rlswitch.switch.ledger import Ledger
from rlswitch.text import first_line
from rlswitch.training.batching import micro_batches, minibatches, to_batch
from rlswitch.training.metrics import Sums, Totals
from rlswitch.training.models import (
    checkpoint_gradients,
    load_causal,
    load_critic,
    load_policy,
    policy_logprobs,
    refuse_leaky_packing,
    sequence_logprobs,
)
from rlswitch.training.parking import Parking
from rlswitch.training.publish import Publisher
from rlswitch.training.reference import FrozenModel, OtherAdapter, Reference
from rlswitch.training.schedule import build_schedule
from rlswitch.types import Batch, Canary, Group, PolicyWeights

T = TypeVar("T")


class Trainer:
    """Owns the trained weights, their version (the number of finished steps), and the algorithm's memory."""

    name = "trainer"

    def __init__(
        self,
        run: Run,
        model_path: str,
        engine_dtype: torch.dtype,
        pad_token_id: int,
        device: Device,
        ledger: Ledger,
        publisher: Publisher,
        canary: list[list[int]],
        say: Callable[[str], None],
    ):
        self.run, self.device, self.ledger = run, device, ledger
        self.publisher, self.engine_dtype = publisher, engine_dtype
        self.pad_token_id, self.canary, self.say = pad_token_id, canary, say
        self.version = 0
        self.skipped: list[str] = []
        """What was not finite in the last update, and therefore left out of it."""
        self.micro_batch_tokens = run.trainer.micro_batch_tokens
        self.memory: Memory = {}
        self.published: PolicyWeights | None = None
        mixed = "bf16" if device.kind == "cuda" and engine_dtype == torch.bfloat16 else "no"
        frozen_dtype = engine_dtype if mixed == "bf16" else torch.float32  # only autocast joins the two
        self.accelerator = Accelerator(mixed_precision=mixed, cpu=device.kind == "cpu")
        with torch.random.fork_rng():  # adapters start at random: the same ones from the same seed
            torch.manual_seed(run.seed)
            self.policy = load_policy(run.model, model_path, frozen_dtype)
            self.critic = (
                load_critic(run.model, model_path, frozen_dtype, run.trainer.packing)
                if run.algorithm.needs_critic
                else None
            )
        if run.trainer.gradient_checkpointing:
            checkpoint_gradients(self.policy)
            if self.critic is not None:
                checkpoint_gradients(self.critic.backbone)
        self.reference = self._load_reference(model_path) if run.algorithm.needs_reference else None
        self.optimizer = self._build_optimizer()
        self.schedule = build_schedule(run, self.optimizer)
        self.policy, self.optimizer = self.accelerator.prepare(self.policy, self.optimizer)
        if self.critic is not None:
            self.critic = self.accelerator.prepare(self.critic)
        if run.trainer.packing:
            with self.accelerator.autocast():
                refuse_leaky_packing(self.unwrapped_policy.eval(), canary, 1e-3 if mixed == "no" else 0.5)
        self.parking = Parking(run.trainer.park, device, self._parts, self.optimizer)

    # -- as a tenant ---------------------------------------------------------------------------

    def acquire(self, weights: PolicyWeights | None) -> None:
        with self.ledger.phase("onload", [os.getpid()]) as phase:
            phase.bytes = self.parking.bring_back()

    def release(self) -> None:
        with self.ledger.phase("offload", [os.getpid()]) as phase:
            self.optimizer.zero_grad(set_to_none=True)
            phase.bytes = self.parking.park()
            self.device.reclaim()

    def unreleased(self) -> str | None:
        return self.parking.unreleased()

    # -- weights -------------------------------------------------------------------------------

    def publish(self) -> PolicyWeights:
        """The current version, written once; the canary's log-probabilities go with it."""
        if self.published is None or self.published.version != self.version:
            with (
                self.ledger.between(self.name, "rollout engine"),
                self.ledger.phase("publish", [os.getpid()]) as phase,
            ):
                model = self.unwrapped_policy.eval()
                with self.accelerator.autocast():
                    logprobs = sequence_logprobs(model, self.canary)
                canary = Canary(sequences=self.canary, logprobs=logprobs)
                self.published = self.publisher.publish(model, self.engine_dtype, self.version, canary)
                phase.bytes = self.published.nbytes
        return self.published

    @property
    def unwrapped_policy(self) -> PreTrainedModel:
        """The policy as it was loaded, with its adapters if it has any, without accelerate's wrapping."""
        return self.accelerator.unwrap_model(self.policy)

    # -- training ------------------------------------------------------------------------------

    def prepare(self, groups: Sequence[Group]) -> Batch:
        """Tensors with old and reference log-probabilities and values, at the current version.

        With `updates_once` the old log-probabilities are left to the update, which computes them anyway.
        Raises SwitchError when a rollout was sampled from another version of the policy.
        """
        with self.ledger.work("prepare"):
            for group in groups:
                for rollout in group.rollouts:
                    if rollout.policy_version != self.version:
                        raise SwitchError(
                            f"prompt {rollout.prompt.index} was sampled from policy version"
                            f" {rollout.policy_version}, the trainer is at {self.version}: its ratios would"
                            " be wrong; publish and generate again"
                        )
            batch = to_batch(groups, self.pad_token_id, self.device.torch)
            if not self.updates_once:
                batch.old_logprobs = self._evaluate(batch, lambda rows: self._logprobs(rows)[0])
            if self.reference is not None:
                with self.reference.model() as reference:
                    batch.reference_logprobs = self._evaluate(
                        batch, lambda rows: self._logprobs(rows, reference)[0]
                    )
            if self.critic is not None:
                batch.values = self._evaluate(batch, self.critic)
            return batch

    def update(self, batch: Batch) -> dict[str, float]:
        """Every pass and minibatch of one step; the version goes up by one. Returns its metrics.

        An optimizer step that would not be finite is left out, a batch that is not finite makes none.
        """
        totals = Totals()
        self.skipped = [f"{name} is not finite" for name in batch.not_finite()]
        if self.updates_once:
            batch.old_logprobs = torch.zeros_like(batch.rollout_logprobs)  # filled in by the one pass
        with self.ledger.work("update"):
            if not self.skipped:
                self._train(batch, totals)
        metrics = {"actor/skipped_updates": float(len(self.skipped))}
        if means := totals.means():
            metrics |= means | self._batch_metrics(batch)
        self.version += 1
        metrics |= {f"algorithm/{name}": value for name, value in self.memory.items()}
        if self.reference is not None:
            metrics["actor/kl_coef"] = self.run.algorithm.current_kl_coef(self.memory)
            if "actor/kl_ref" in metrics:
                self.run.algorithm.end_step(self.memory, metrics["actor/kl_ref"], len(batch))
            refresh = self.run.algorithm.reference_refresh
            if refresh and self.version % refresh == 0:
                self.reference.refresh()
        return metrics

    @property
    def fitted_tokens(self) -> int | None:
        """What micro-batches have come to where memory ran out; None: as they were set."""
        reduced = self.micro_batch_tokens < self.run.trainer.micro_batch_tokens
        return self.micro_batch_tokens if reduced else None

    @property
    def updates_once(self) -> bool:
        """Whether the policy is still what sampled when the one gradient of a step is taken.

        The ratio is then 1 by definition, so old log-probabilities need no pass of their own: exact.
        """
        config = self.run.trainer
        return config.epochs == config.minibatches == 1 and not self.run.algorithm.needs_old_logprobs

    def _train(self, batch: Batch, totals: Totals) -> None:
        config = self.run.trainer
        for part in self._trained_parts():
            part.train(config.gradient_checkpointing)  # it works in training mode only
        for epoch in range(config.epochs):
            seed = request_seed(self.run.seed, self.version, -1, epoch)
            count = min(config.minibatches, len(batch))  # rollouts without a reward are left out
            for rows in minibatches(len(batch), count, seed):
                self._step(batch, rows.to(self.device.torch), totals)
        for part in self._trained_parts():
            part.eval()

    def _step(self, batch: Batch, chosen: Tensor, totals: Totals) -> None:
        """One optimizer step on the rollouts `chosen` [N] of the batch, unless it would not be finite."""
        algorithm, minibatch = self.run.algorithm, batch.rows(chosen)
        counted = minibatch.loss_mask
        if algorithm.mask_truncated:
            counted = counted & ~minibatch.truncated[:, None]
        minibatch.weights = token_weights(
            counted, algorithm.loss_aggregation, self.run.rollout.max_new_tokens
        )
        sums = self._within_memory(minibatch, lambda: self._accumulate(batch, chosen, minibatch))
        losses = sums.per_step
        losses["actor/grad_norm"] = self._clip(self.policy)
        if self.critic is not None:
            losses["critic/grad_norm"] = self._clip(self.critic)
        losses["actor/lr"] = float(self.schedule.get_last_lr()[0])
        broken = [f"{name} = {value}" for name, value in losses.items() if not math.isfinite(value)]
        if broken:
            self.skipped.append(", ".join(broken))
        else:
            if losses["actor/grad_norm"] == 0 and not minibatch.advantages[counted].any():
                self.policy.zero_grad(set_to_none=True)  # the optimizer's momentum would move it all the same
            self._apply()
            self.schedule.step()
            totals.add(sums)
        self.optimizer.zero_grad(set_to_none=True)

    def _apply(self) -> None:
        """The optimizer's step; once more where the first one finds no memory for the states that it makes.

        Raises RLSwitchError when it finds none then either.
        """
        for tries_left in (1, 0):
            try:
                self.optimizer.step()
                return
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                reason = first_line(error)
            states = self.optimizer.state.values()
            if not tries_left or any(state and float(state["step"]) > 0 for state in states):
                raise RLSwitchError(
                    f"step {self.version + 1}: the optimizer ran out of memory ({reason}), and smaller"
                    " micro-batches would not help; set trainer.park=everything, or model.lora_rank"
                )
            for state in states:
                state.clear()  # half made, maybe
            self.device.reclaim()

    def _accumulate(self, batch: Batch, chosen: Tensor, minibatch: Batch) -> Sums:
        """Forward and backward of a minibatch; starts from no gradients, so it can be done again.

        Gradients are sums over tokens weighted once for the whole minibatch.
        """
        algorithm, sums = self.run.algorithm, Sums()
        self.optimizer.zero_grad(set_to_none=True)
        for index in self._micro_batches(minibatch):
            rows = minibatch.rows(index)
            logprobs, entropy = self._logprobs(rows)
            if self.updates_once:
                rows.old_logprobs = logprobs.detach()
                batch.old_logprobs[chosen[index], : logprobs.shape[1]] = rows.old_logprobs
            loss, metrics = algorithm.policy_loss(rows, logprobs, entropy, self.memory)
            policy_loss = weighted_sum(loss, rows.weights)
            self.accelerator.backward(policy_loss)
            sums.per_step["actor/pg_loss"] += policy_loss.item()
            metrics["actor/entropy"] = entropy
            if self.critic is not None:
                with self.accelerator.autocast():
                    values = self.critic(rows)
                assert rows.returns is not None, "an algorithm with a critic returns its targets"
                loss, more = value_loss(values, rows.values, rows.returns, clip=algorithm.value_clip)
                critic_loss = weighted_sum(loss, rows.weights)
                self.accelerator.backward(critic_loss)
                sums.per_step["critic/vf_loss"] += critic_loss.item()
                metrics |= more
            sums.add_tokens(metrics, rows.loss_mask)
        return sums

    def _logprobs(self, batch: Batch, model: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        with self.accelerator.autocast():
            config = self.run
            return policy_logprobs(
                model or self.policy, batch, config.rollout.temperature, config.trainer.packing
            )

    def _micro_batches(self, batch: Batch) -> Iterator[Tensor]:
        return micro_batches(batch, self.micro_batch_tokens, self.run.trainer.packing)

    def _evaluate(self, batch: Batch, score: Callable[[Batch], Tensor]) -> Tensor:
        """`score` of every row [B, T] without gradients, by micro-batches."""
        result = torch.zeros(batch.completion_mask.shape, device=batch.token_ids.device)

        def evaluate() -> Tensor:
            with torch.no_grad(), self.accelerator.autocast():
                for index in self._micro_batches(batch):
                    values = score(batch.rows(index))
                    result[index, : values.shape[1]] = values.float()
            return result

        return self._within_memory(batch, evaluate)

    def _within_memory(self, batch: Batch, work: Callable[[], T]) -> T:
        """`work()`, again with micro-batches of half the size for as long as the memory does not suffice.

        The result is the same up to the order of sums. The smaller size stays for the rest of the run.
        Raises RLSwitchError when the longest rollout of `batch` does not fit alone.
        """
        while True:
            try:
                return work()
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                reason = first_line(error)
            # Out of the handler: the exception's frames held the tensors of what did not fit.
            self.optimizer.zero_grad(set_to_none=True)
            self.device.reclaim()
            self._halve(batch, reason)

    def _halve(self, batch: Batch, reason: str) -> None:
        step, longest = self.version + 1, int(batch.attention_mask.sum(-1).max())
        tried = min(self.micro_batch_tokens, batch.attention_mask.numel())
        if tried <= longest:
            raise RLSwitchError(
                f"step {step}: one rollout of {longest} tokens does not fit alone ({reason}); set"
                " trainer.gradient_checkpointing=true, trainer.park=everything, model.lora_rank, or a smaller"
                " rollout.max_new_tokens"
            )
        self.micro_batch_tokens = max(tried // 2, longest)
        self.say(
            f"out of memory in step {step}: micro-batches of {self.micro_batch_tokens} tokens from here on,"
            f" with the same result; trainer.micro_batch_tokens={self.micro_batch_tokens} starts with it"
        )

    def _batch_metrics(self, batch: Batch) -> dict[str, float]:
        assert batch.old_logprobs is not None
        metrics = mismatch_metrics(batch.rollout_logprobs, batch.old_logprobs, batch.loss_mask)
        if batch.values is not None and batch.returns is not None:
            values, returns = batch.values[batch.loss_mask], batch.returns[batch.loss_mask]
            unexplained = (returns - values).var(correction=0) / returns.var(correction=0)
            metrics["critic/explained_var"] = float(1 - unexplained) if returns.std() > 0 else 0.0
            metrics["critic/values_mean"] = float(values.mean())
        return metrics

    def _clip(self, model: nn.Module) -> float:
        norm = self.accelerator.clip_grad_norm_(model.parameters(), self.run.trainer.max_grad_norm)
        return float(norm)

    def _load_reference(self, model_path: str) -> Reference:
        if self.run.model.lora_rank:
            return OtherAdapter(self.policy)
        frozen = load_causal(self.run.model, model_path, self.engine_dtype)
        frozen.to(self.device.torch)
        return FrozenModel(frozen, self.policy)

    def _build_optimizer(self) -> torch.optim.Optimizer:
        config = self.run.trainer
        groups = [{"params": trained(self.policy), "lr": config.lr}]
        if self.critic is not None:
            groups.append({"params": trained(self.critic), "lr": config.critic_lr})
        return torch.optim.AdamW(
            groups,
            lr=config.lr,  # what an absolute min_lr of a schedule is measured against
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )

    def _trained_parts(self) -> list[nn.Module]:
        return [self.policy] if self.critic is None else [self.policy, self.critic]

    def _parts(self) -> Iterator[nn.Module]:
        yield from self._trained_parts()
        if self.reference is not None:
            yield from self.reference.parts


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
