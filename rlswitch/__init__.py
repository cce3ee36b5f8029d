"""rlswitch: RLHF on the GPU you have. One accelerator, many tenants, every hand-over proven."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlswitch.serving.serve import complete, serve

__all__ = ["complete", "serve"]
__version__ = "0.1.0"

if not Path(__file__).with_name("conf").is_dir():  # a checkout: what a wheel ships inside lies beside
    __path__.append(str(Path(__file__).resolve().parents[1]))


def __getattr__(name: str) -> Any:
    """`rlswitch.serve` and `rlswitch.complete`; torch and vLLM are imported when one is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from rlswitch.serving import serve as serving

    return {"complete": serving.complete, "serve": serving.serve}[name]
