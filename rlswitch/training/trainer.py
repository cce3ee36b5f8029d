"""The trainer: policy, critic and reference under accelerate. A tenant of the switch like any engine.

It knows no algorithm by name: an algorithm weights the tokens of a batch and gives each a loss.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlswitch.algorithms.base import Memory
from rlswitch.algorithms.losses import value_loss, weighted_sum
from rlswitch.errors import SwitchError
from rlswitch.run import Run
from rlswitch.seeds import request_seed
from rlswitch.switch.ledger import Ledger
from rlswitch.training.batching import micro_batches, minibatches, to_batch
from rlswitch.training.logprobs import check_packing, policy_logprobs, sequence_logprobs
from rlswitch.training.memory import MemoryLimit
from rlswitch.training.metrics import Sums, batch_metrics, means
from rlswitch.training.models import Critic, load_model, load_trained
from rlswitch.training.parking import Parking
from rlswitch.training.publish import Publisher
from rlswitch.training.reference import FrozenModel, OtherAdapter
from rlswitch.training.schedule import build_optimizer, build_schedule
from rlswitch.types import Batch, Canary, Group, PolicyWeights


class Trainer:
    """Owns the trained weights, their version (the number of training steps) and the algorithm's memory."""

    name = "trainer"

    def __init__(
        self,
        run: Run,
        model_path: str,
        engine_dtype: torch.dtype,
        pad_token_id: int,
        ledger: Ledger,
        publisher: Publisher,
        canary: list[list[int]],
        log: Callable[[str], None],
    ):
        self.run, self.ledger, self.device = run, ledger, ledger.device
        self.engine_dtype, self.pad_token_id = engine_dtype, pad_token_id
        self.publisher, self.canary = publisher, canary
        self.version = 0
        self.memory: Memory = {}
        self.published: PolicyWeights | None = None
        self.skipped: list[str] = []
        """Why optimizer steps of the last update were skipped."""
        self.limit = MemoryLimit(run.trainer.micro_batch_tokens, self.device, should_reduce_batch_size, log)
        cuda = self.device.kind == "cuda"
        is_mixed = cuda and engine_dtype == torch.bfloat16
        frozen_dtype = engine_dtype if is_mixed else torch.float32  # only autocast can join two dtypes
        self.accelerator = Accelerator(mixed_precision="bf16" if is_mixed else "no", cpu=not cuda)
        algorithm, model, config = run.algorithm, run.model, run.trainer
        self.critic: nn.Module | None = None
        self.reference: FrozenModel | OtherAdapter | None = None
        with torch.random.fork_rng():  # the same seed starts the same adapters
            torch.manual_seed(run.seed)
            self.policy = load_trained(run, model_path, frozen_dtype, causal=True)
            if algorithm.needs_critic:
                backbone = load_trained(run, model_path, frozen_dtype, causal=False)
                self.critic = Critic(backbone, config.packing)
        if algorithm.needs_reference and model.lora_rank:
            self.reference = OtherAdapter(self.policy)
        elif algorithm.needs_reference:
            frozen = load_model(model, model_path, engine_dtype, causal=True)
            self.reference = FrozenModel(frozen.to(self.device.torch), self.policy)
        self.optimizer = build_optimizer(config, self.policy, self.critic)
        self.schedule = build_schedule(run, self.optimizer)
        self.policy, self.optimizer = self.accelerator.prepare(self.policy, self.optimizer)
        if self.critic is not None:
            self.critic = self.accelerator.prepare(self.critic)
        if config.packing:
            with self.accelerator.autocast():
                check_packing(self.unwrapped_policy.eval(), canary, 0.5 if is_mixed else 1e-3)
        self.parking = Parking(config.park, self.device, self._modules, self.optimizer)

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

    def publish(self) -> PolicyWeights:
        """The current version with its canary, written once."""
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
        """The policy, adapters included, without accelerate's wrapper."""
        return self.accelerator.unwrap_model(self.policy)

    def prepare(self, groups: Sequence[Group]) -> Batch:
        """Tensors with old log-probabilities (see updates_once), reference log-probabilities and values.

        Raises SwitchError when a rollout was sampled from another version of the policy.
        """
        with self.ledger.work("prepare"):
            for rollout in (rollout for group in groups for rollout in group.rollouts):
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
                with self.reference.model() as model:
                    batch.reference_logprobs = self._evaluate(
                        batch, lambda rows: self._logprobs(rows, model)[0]
                    )
            if self.critic is not None:
                batch.values = self._evaluate(batch, self.critic)
            return batch

    def update(self, batch: Batch) -> dict[str, float]:
        """All epochs and minibatches of one step; raises the version by one and returns the metrics.

        Skips an optimizer step that would not be finite, and a whole batch that is not.
        """
        steps: list[Sums] = []
        self.skipped = [f"{name} is not finite" for name in batch.not_finite()]
        with self.ledger.work("update"):
            if not self.skipped:
                self._train(batch, steps)
        metrics = {"actor/skipped_updates": float(len(self.skipped))}
        if steps:
            metrics |= means(steps) | batch_metrics(batch)
        self.version += 1
        metrics |= {f"algorithm/{name}": value for name, value in self.memory.items()}
        if self.reference is not None:
            algorithm = self.run.algorithm
            metrics["actor/kl_coef"] = algorithm.current_kl_coef(self.memory)
            if "actor/kl_ref" in metrics:
                algorithm.end_step(self.memory, metrics["actor/kl_ref"], len(batch))
            if algorithm.reference_refresh and self.version % algorithm.reference_refresh == 0:
                self.reference.refresh()
        return metrics

    @property
    def updates_once(self) -> bool:
        """Whether a step's only gradient is taken at the policy that sampled: its ratios are 1 by definition.

        Then the update's own forward pass has the old log-probabilities: `prepare` does not compute them,
        and `update` writes them to batch.old_logprobs. Exact.
        """
        config = self.run.trainer
        return config.epochs == config.minibatches == 1 and not self.run.algorithm.needs_old_logprobs

    def _train(self, batch: Batch, steps: list[Sums]) -> None:
        config = self.run.trainer
        if self.updates_once:
            batch.old_logprobs = torch.zeros_like(batch.rollout_logprobs)  # until _accumulate writes them
        for part in self._trained.values():
            part.train(config.gradient_checkpointing)  # transformers checkpoints in training mode only
        for epoch in range(config.epochs):
            seed = request_seed(self.run.seed, self.version, -1, epoch)
            count = min(config.minibatches, len(batch))  # rollouts without a reward are missing
            for rows in minibatches(len(batch), count, seed):
                self._step(batch, rows.to(self.device.torch), steps)
        for part in self._trained.values():
            part.eval()

    def _step(self, batch: Batch, chosen: Tensor, steps: list[Sums]) -> None:
        """One optimizer step on the rollouts `chosen` [N] of the batch, skipped if it would not be finite."""
        minibatch = batch.rows(chosen)
        minibatch.weights = self.run.algorithm.loss_weights(minibatch, self.run.rollout.max_new_tokens)
        accumulate = partial(self._accumulate, batch, chosen, minibatch)
        sums = self.limit.shrinking(self.version + 1, minibatch, accumulate)
        if broken := sums.not_finite():
            self.skipped.append(", ".join(broken))
        else:
            self._apply(minibatch, sums)
            steps.append(sums)
        self.optimizer.zero_grad(set_to_none=True)

    def _accumulate(self, batch: Batch, chosen: Tensor, minibatch: Batch) -> Sums:
        """The clipped gradients of a minibatch; starts without any, so it can be repeated.

        Losses are sums weighted once for the whole minibatch, so gradients add up over micro-batches.
        """
        sums, config = Sums(), self.run.trainer
        self.optimizer.zero_grad(set_to_none=True)
        for index in micro_batches(minibatch.lengths, self.limit.tokens, config.packing):
            rows = minibatch.rows(index)
            logprobs, entropy = self._logprobs(rows)
            if self.updates_once:
                rows.old_logprobs = logprobs.detach()
                batch.old_logprobs[chosen[index], : logprobs.shape[1]] = rows.old_logprobs
            loss, metrics = self.run.algorithm.policy_loss(rows, logprobs, entropy, self.memory)
            sums.per_step["actor/pg_loss"] += self._backward(loss, rows)
            metrics["actor/entropy"] = entropy
            if self.critic is not None:
                with self.accelerator.autocast():
                    values = self.critic(rows)
                assert rows.returns is not None, "an algorithm with a critic returns its targets"
                clip = self.run.algorithm.value_clip
                loss, clipped = value_loss(values, rows.values, rows.returns, clip=clip)
                sums.per_step["critic/vf_loss"] += self._backward(loss, rows)
                metrics |= clipped
            sums.add_tokens(metrics, rows.loss_mask)
        for name, part in self._trained.items():
            norm = self.accelerator.clip_grad_norm_(part.parameters(), config.max_grad_norm)
            sums.per_step[f"{name}/grad_norm"] = float(norm)
        sums.per_step["actor/lr"] = float(self.schedule.get_last_lr()[0])
        return sums

    def _backward(self, loss: Tensor, rows: Batch) -> float:
        total = weighted_sum(loss, rows.weights)
        self.accelerator.backward(total)
        return total.item()

    def _apply(self, minibatch: Batch, sums: Sums) -> None:
        if sums.per_step["actor/grad_norm"] == 0 and not minibatch.advantages[minibatch.weights > 0].any():
            self.policy.zero_grad(set_to_none=True)  # the optimizer's momentum would move it nevertheless
        self.limit.apply(self.version + 1, self.optimizer)
        self.schedule.step()

    def _evaluate(self, batch: Batch, score: Callable[[Batch], Tensor]) -> Tensor:
        """`score` of every row [B, T] without gradients, by micro-batches."""
        result = torch.zeros(batch.completion_mask.shape, device=self.device.torch)

        def evaluate() -> Tensor:
            with torch.no_grad(), self.accelerator.autocast():
                for index in micro_batches(batch.lengths, self.limit.tokens, self.run.trainer.packing):
                    values = score(batch.rows(index))
                    result[index, : values.shape[1]] = values.float()
            return result

        return self.limit.shrinking(self.version + 1, batch, evaluate)

    def _logprobs(self, batch: Batch, model: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        run = self.run
        with self.accelerator.autocast():
            return policy_logprobs(model or self.policy, batch, run.rollout.temperature, run.trainer.packing)

    @property
    def _trained(self) -> dict[str, nn.Module]:
        return {"actor": self.policy} | ({} if self.critic is None else {"critic": self.critic})

    def _modules(self) -> Iterator[nn.Module]:
        yield from self._trained.values()
        if self.reference is not None:
            yield from self.reference.parts
