"""rlswitch: RLHF on the GPU you have. One accelerator, many tenants, every hand-over proven."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlswitch.serving import complete, serve

__all__ = ["complete", "serve"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`rlswitch.serve` and `rlswitch.complete`; torch and vLLM are imported when one is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from rlswitch import serving

    return {"complete": serving.complete, "serve": serving.serve}[name]
