"""What is wrong with an engine's settings, without loading anything: one line per mistake."""

from collections.abc import Iterator

from rlswitch.config.sections import EngineConfig, ServerEngineConfig
from rlswitch.engines.vllm.address import parse_listen, parse_url

_OWNED = {
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
_PROOF = "worker_cls logprobs_mode enable_prefix_caching enable_sleep_mode skip_tokenizer_init max_logprobs"
FIXED = {
    **{key: f"has a setting of its own; set {setting}" for key, setting in _OWNED.items()},
    **dict.fromkeys(_PROOF.split(), "is fixed, a push could not be proven otherwise; leave it out"),
    "enable_lora": "a push carries the merged weights, so the engine needs no adapters, and with them sleep"
    " level 2 loses their base; leave it out, set model.lora_rank",
    "enable_ep_weight_filter": "ranks would skip tensors of a push, which could not be proven; leave it out",
}
"""Arguments of vLLM that are not the user's to set, and why."""


def engine_problems(settings: EngineConfig) -> Iterator[str]:
    """Arguments of vLLM that are not the user's to set; addresses that are wrong or that others reach."""
    yield from (f"engine.vllm.{key}: {FIXED[key]}" for key in settings.vllm if key in FIXED)
    if not isinstance(settings, ServerEngineConfig):
        return
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
            f"engine.{key} = {text}: is not on this machine's loopback; vLLM's control endpoints have no"
            " authentication (--api-key does not cover them): whoever reaches them can replace the weights,"
            " read the prompts and run methods of the workers; use 127.0.0.1 or a Unix socket, or set"
            " engine.allow_remote=true on a network that you trust"
        )
