"""What is wrong with an engine's settings, without loading anything: one line per mistake."""

from __future__ import annotations

from collections.abc import Iterator

from rlswitch.config.sections import EngineConfig, ServerEngineConfig
from rlswitch.engines.vllm.address import UNPROTECTED, parse_listen, parse_url

OWNED_BY_SETTINGS = {
    "model": "model.path",
    "dtype": "model.dtype",
    "trust_remote_code": "model.trust_remote_code",
    "seed": "seed",
    "max_model_len": "engine.max_model_len",
    "gpu_memory_utilization": "engine.gpu_memory_utilization",
    "kv_cache_memory_bytes": "engine.kv_cache_gib",
    "tensor_parallel_size": "engine.tensor_parallel_size",
    "enforce_eager": "engine.enforce_eager",
}
"""Arguments of vLLM that have a setting here."""

NEEDED_BY_PROOF = (
    "worker_cls",
    "logprobs_mode",
    "enable_prefix_caching",
    "enable_sleep_mode",
    "skip_tokenizer_init",
    "max_logprobs",
)
"""Arguments of vLLM that a proof depends on."""


def engine_problems(settings: EngineConfig) -> Iterator[str]:
    """Arguments of vLLM that are not the user's to set, and bad addresses."""
    for key in settings.vllm:
        if key in OWNED_BY_SETTINGS:
            yield f"engine.vllm.{key}: has a setting of its own; set {OWNED_BY_SETTINGS[key]}"
        elif key == "enable_lora":
            yield (
                "engine.vllm.enable_lora: a push carries the merged weights, so the engine needs no adapters,"
                " and with them sleep level 2 loses their base; leave it out, set model.lora_rank"
            )
        elif key in NEEDED_BY_PROOF:
            yield f"engine.vllm.{key}: is fixed, a push could not be proven otherwise; leave it out"
    if isinstance(settings, ServerEngineConfig):
        yield from address_problems(settings)


def address_problems(settings: ServerEngineConfig) -> Iterator[str]:
    """Addresses that cannot be parsed, and those that others could reach."""
    for key in ("host", "port", "uds"):
        if key in settings.vllm:
            yield f"engine.vllm.{key}: has a setting of its own; set engine.listen"
    try:
        key, text = ("url", settings.url) if settings.url is not None else ("listen", settings.listen)
        address = parse_url(text) if key == "url" else parse_listen(text)
    except ValueError as error:
        yield f"engine.{key} = {text}: {error}"
        return
    if address is not None and not address.is_local and not settings.allow_remote:
        yield (
            f"engine.{key} = {text}: is not on this machine's loopback; {UNPROTECTED}; use 127.0.0.1 or a"
            " Unix socket, or set engine.allow_remote=true on a network that you trust"
        )
