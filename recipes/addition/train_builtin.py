"""Trains the built-in models on first use and caches them."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch
from rich.progress import track
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

LR, WARMUP = 2e-3, 20
STALE_SECONDS = 24 * 3600.0
"""Older drafts were left by processes that were killed."""

Model = TypeVar("Model", bound=nn.Module)
Batch = TypeVar("Batch")


def train(
    build: Callable[[], Model],
    batches: Iterable[Batch],
    loss: Callable[[Model, Batch], Tensor],
    *,
    steps: int,
    seed: int,
    what: str,
    lr: float = LR,
    show: bool = True,
) -> Model:
    """Builds a model and trains it for `steps` steps, one batch each. Deterministic given the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        # float32 throughout: bfloat16, which Muon uses internally, is many times slower on older CPUs.
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        for step, batch in enumerate(track(batches, description=what, total=steps, disable=not show)):
            optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / WARMUP) * (1 - step / steps)
            optimizer.zero_grad()
            loss(model, batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return model


def cached(
    name: str,
    sources: Sequence[str],
    seed: int,
    make: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    log: Callable[[str], None],
) -> Path:
    """The cached model directory; calls `make` if there is none or the files `sources` have changed."""
    recipe = hashlib.sha256(b"".join(Path(file).read_bytes() for file in (*sources, __file__)))
    recipe.update(torch.__version__.encode())
    path = cache_directory() / f"{name}-{recipe.hexdigest()[:12]}-seed{seed}"
    if path.is_dir():
        return path
    log(f"training builtin:{name} (about a minute; cached in {path.parent})")
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{name}-*"):
        with suppress(OSError):  # its process may have just renamed or removed it
            if time.time() - stale.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(stale)
    draft = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{name}-"))
    try:
        for part in make():
            part.save_pretrained(draft)
        draft.rename(path)
    except OSError:  # another process cached the same model first
        if not path.is_dir():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return path


def cache_directory() -> Path:
    """$RLSWITCH_CACHE, or rlswitch/ in the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlswitch"
    return Path(os.environ.get("RLSWITCH_CACHE") or default)
