"""vLLM's HTTP server, driven through its development and completions endpoints."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from rlswitch.engines.backend import Completion
from rlswitch.engines.spec import Launch
from rlswitch.engines.vllm.backend import VLLMBackend
from rlswitch.engines.vllm.launcher import attached, launched, server_settings
from rlswitch.engines.vllm.watch import at_work, has_ended
from rlswitch.errors import EngineError, EngineLost
from rlswitch.processes.group import ProcessGroup

USUAL = {
    # A server takes its defaults from the model's generation_config.json.
    **{"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
    **{"logprobs": 0, "return_token_ids": True, "return_tokens_as_token_ids": True},
}
"""Sent with every request."""


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
            return self.client.rpc(method, **kwargs)
        except EngineError as error:  # a server whose worker has died may still answer, with an error
            raise (EngineLost(str(error)) if has_ended(self.family.vital) else error) from error

    def call(self, verb: str, **arguments: Any) -> Any:
        return self.client.post(f"/{verb}", **arguments).get("success")

    def close(self) -> None:
        self.stack.close()

    def _is_sleeping(self) -> bool:
        return self.client.is_sleeping()

    def _run(
        self, prompts: Sequence[list[int]], parameters: Sequence[dict[str, Any]], into: dict[int, Completion]
    ) -> None:
        def take(index: int, reply: Any) -> None:
            into[index] = _completion(prompts[index], reply)

        bodies = [
            USUAL | {"prompt": tokens} | given for tokens, given in zip(prompts, parameters, strict=True)
        ]
        self.client.post_all("/v1/completions", bodies, take)
        if not self.family.vital and self.collective_rpc("memory")[0]["token"] != self.workers[0]["token"]:
            into.clear()
            raise EngineLost(f"{self.client.address} answers, but is not the server that was pushed to")

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


def _completion(prompt: list[int], reply: Any) -> Completion:
    (choice,) = reply["choices"]
    positions = (choice.get("prompt_logprobs") or [])[1:]
    details = reply["usage"].get("prompt_tokens_details") or {}
    return Completion(
        token_ids=choice["token_ids"],
        logprobs=choice["logprobs"]["token_logprobs"],
        finish_reason=choice["finish_reason"] or "unfinished",
        prompt_logprobs=[it[str(token)]["logprob"] for it, token in zip(positions, prompt[1:], strict=False)],
        cached_tokens=details.get("cached_tokens") or 0,
    )
