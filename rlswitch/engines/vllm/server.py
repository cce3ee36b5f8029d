"""vLLM's HTTP server, driven through its development and completions endpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from rlswitch.engines.backend import Completion, Request
from rlswitch.engines.spec import Launch
from rlswitch.engines.vllm.backend import VLLMBackend
from rlswitch.engines.vllm.launcher import attached, launched, server_settings
from rlswitch.engines.vllm.watch import at_work, has_ended
from rlswitch.errors import EngineError, EngineLost
from rlswitch.processes.group import ProcessGroup

COMPLETIONS = "/v1/completions"
PLAIN = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Sent with every request: a server takes its defaults from the model's generation_config.json."""


class ServerBackend(VLLMBackend):
    """The verbs over HTTP, token ids in and out; launcher.py starts the server or attaches to it."""

    def __init__(self, launch: Launch):
        settings = server_settings(launch.spec)
        self.family = ProcessGroup()  # a server that was already running is not ours to end
        with ExitStack() as stack:
            if settings.url:
                self.client = stack.enter_context(attached(settings, launch.spec.model_path))
            else:
                self.client, self.family = stack.enter_context(launched(launch))
            super().__init__(launch, elsewhere=not self.client.address.is_local)
            self._check_reports_cached_tokens()
            self.client.deadline = at_work(settings)
            self.stack = stack.pop_all()

    def collective_rpc(self, method: str, **kwargs: Any) -> list[Any]:
        try:
            return self.client.post("/collective_rpc", {"method": method, "kwargs": kwargs})["results"]
        except EngineError as error:  # a server whose worker has died may still answer, with an error
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
            raise EngineLost(f"{self.client.address} answers, but is not the server that was pushed to")

    def score(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        positions = [
            reply["choices"][0]["prompt_logprobs"][1:] for reply in self._probe(sequences, prompt_logprobs=0)
        ]
        return [
            [position[str(token)]["logprob"] for position, token in zip(row, sequence[1:], strict=True)]
            for row, sequence in zip(positions, sequences, strict=True)
        ]

    def count_cached_tokens(self, sequences: Sequence[list[int]]) -> int:
        details = [reply["usage"].get("prompt_tokens_details") or {} for reply in self._probe(sequences)]
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

    def _probe(self, sequences: Sequence[list[int]], **more: int) -> list[Any]:
        """The replies to `sequences` as prompts, each with one generated token."""
        return self._complete(
            [{"prompt": tokens, "temperature": 0.0, "max_tokens": 1, **more} for tokens in sequences]
        )

    def _complete(
        self, bodies: Sequence[dict[str, Any]], take: Callable[[int, Any], None] = lambda index, reply: None
    ) -> list[Any]:
        return self.client.post_all(COMPLETIONS, [body | PLAIN for body in bodies], take)

    def _check_reports_cached_tokens(self) -> None:
        """Raises EngineError if it does not: its prefix cache would look empty to every proof."""
        length = min(2 * self.block_size + 1, self.facts["max_model_len"] - 1)
        if length <= self.block_size:
            return  # no prompt is long enough to be cached
        prompt = [self.stop_token_ids[0]] * length
        if not self.count_cached_tokens([prompt]) and not self.count_cached_tokens([prompt]):
            raise EngineError(
                "vLLM's server does not report how many tokens its prefix cache served, so no push could be"
                " proven; start it with --enable-prompt-tokens-details and --enable-prefix-caching"
            )
