"""vLLM's HTTP server, driven through its development and completions endpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlswitch.engines.backend import Completion, Request
from rlswitch.engines.vllm.backend import VLLMBackend
from rlswitch.engines.vllm.launcher import attached, launched, server_config
from rlswitch.engines.vllm.watch import at_work, has_ended
from rlswitch.errors import EngineError, EngineLost
from rlswitch.processes.group import ProcessGroup
from rlswitch.run import Run
from rlswitch.switch.device import Device

COMPLETIONS = "/v1/completions"
PLAIN = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Said in every request: a server would fill in what the model's generation_config.json prefers."""


class ServerBackend(VLLMBackend):
    """The verbs over HTTP, token ids in and out; hosting.py says where the server comes from."""

    def __init__(
        self,
        run: Run,
        model_path: str,
        tokenizer: PreTrainedTokenizerBase,
        device: Device,
        log_path: Path,
        publish_root: Path,
        warm: bool = True,
    ):
        config = server_config(run)
        self.family = ProcessGroup()  # of a server that was there before: none of ours
        with ExitStack() as stack:
            if config.url:
                self.client = stack.enter_context(attached(config, model_path))
            else:
                server = launched(run, model_path, device, log_path, publish_root)
                self.client, self.family = stack.enter_context(server)
            elsewhere = not self.client.address.is_local
            super().__init__(model_path, tokenizer, device, elsewhere=elsewhere, warm=warm)
            self._check_that_cached_tokens_are_told()
            self.client.patience = at_work(config)
            self.stack = stack.pop_all()

    def collective_rpc(self, method: str, **kwargs: Any) -> list[Any]:
        try:
            return self.client.post("/collective_rpc", {"method": method, "kwargs": kwargs})["results"]
        except EngineError as error:  # the server's answer for a worker that has died is one of refusal
            raise (EngineLost(str(error)) if has_ended(self.family.vital) else error) from error

    def reset_prefix_cache(self) -> bool:
        return bool(self.client.post("/reset_prefix_cache").get("success"))

    def generate(self, requests: Sequence[Request], into: dict[int, Completion]) -> None:
        bodies = [
            {
                "prompt": request.token_ids,
                "temperature": request.temperature,
                "seed": request.seed,
                "max_tokens": request.max_new_tokens,
                "logprobs": 0,
                "stop_token_ids": self.stop_token_ids,
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
            }
            for request in requests
        ]

        def take(index: int, reply: Any) -> None:
            choice = reply["choices"][0]
            into[index] = Completion(
                token_ids=choice["token_ids"],
                logprobs=choice["logprobs"]["token_logprobs"],
                finish_reason=choice["finish_reason"] or "unfinished",
            )

        self._complete(bodies, take)
        if not self.family.vital and self.collective_rpc("memory")[0]["token"] != self.workers[0]["token"]:
            into.clear()
            raise EngineLost(f"{self.client.address} answers, and is not the server that was pushed to")

    def score(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        replies = self._complete(
            [
                {"prompt": tokens, "temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0}
                for tokens in sequences
            ]
        )
        positions = [reply["choices"][0]["prompt_logprobs"][1:] for reply in replies]
        return [
            [position[str(token)]["logprob"] for position, token in zip(row, sequence[1:], strict=True)]
            for row, sequence in zip(positions, sequences, strict=True)
        ]

    def count_cached_tokens(self, sequences: Sequence[list[int]]) -> int:
        replies = self._complete(
            [{"prompt": tokens, "temperature": 0.0, "max_tokens": 1} for tokens in sequences]
        )
        details = [reply["usage"].get("prompt_tokens_details") or {} for reply in replies]
        return sum(item.get("cached_tokens") or 0 for item in details)

    def close(self) -> None:
        self.stack.close()

    def _sleep(self, level: int) -> None:
        self.client.post("/sleep", level=level)

    def _release_kv_cache(self) -> None:
        self.client.post("/release_kv_cache_memory")

    def _wake_up(self, tag: str) -> None:
        self.client.post("/wake_up", tags=tag)

    def _is_sleeping(self) -> bool:
        return self.client.get("/is_sleeping")["is_sleeping"]

    def _complete(
        self, bodies: Sequence[dict[str, Any]], take: Callable[[int, Any], None] = lambda index, reply: None
    ) -> list[Any]:
        return self.client.post_all(COMPLETIONS, [body | PLAIN for body in bodies], take)

    def _check_that_cached_tokens_are_told(self) -> None:
        """A server that says nothing of them looks like one that has none: a proof would mean nothing."""
        length = min(2 * self.block_size + 1, self.facts["max_model_len"] - 1)
        if length <= self.block_size:
            return  # no prompt is long enough to be cached
        prompt = [self.stop_token_ids[0]] * length
        if not self.count_cached_tokens([prompt]) and not self.count_cached_tokens([prompt]):
            raise EngineError(
                "vLLM's server does not tell how many tokens its prefix cache answered, so no push could be"
                " proven; start it with --enable-prompt-tokens-details and --enable-prefix-caching"
            )
