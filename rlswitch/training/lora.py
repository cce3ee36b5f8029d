"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) by peft: train little, push the whole model.

The engine never hears of adapters: a push carries the merged weights, so sleep level 2 loses nothing
that the next push would not bring, and the engine runs its plain, fast kernels.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear, LoraLayer
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlswitch.config.sections import ModelConfig
from rlswitch.errors import ConfigError
from rlswitch.text import first_line

ADAPTER = "default"
WEIGHTS = "adapter_model.safetensors"
LORA = ".lora_"


def add_adapters(model: Any, config: ModelConfig, path: str, *, causal: bool) -> PeftModel:
    """`model`, loaded from `path`, frozen, with trainable float32 adapters that start as no change at all.

    Raises ConfigError for layers that a push could not carry merged.
    """
    adapters = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,  # type: ignore[arg-type]  # 0.5 is fine
        target_modules=list(config.lora_targets) or "all-linear",
        bias="none",
        task_type="CAUSAL_LM" if causal else None,
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings")  # refused below
            adapted = get_peft_model(model, adapters)
    except ValueError as error:
        raise ConfigError(
            f"model.lora_targets = {config.lora_targets}: {first_line(error)};"
            " name linear layers of the model, as q_proj, or [] for all of them"
        ) from error
    _refuse_what_cannot_be_merged(adapted, config)
    # What loads the adapter has to find its base, from wherever it is started.
    local = Path(path).exists()
    adapted.peft_config[ADAPTER].base_model_name_or_path = str(Path(path).absolute()) if local else path
    adapted.peft_config[ADAPTER].revision = None if local else config.revision
    return adapted


def _refuse_what_cannot_be_merged(model: PeftModel, config: ModelConfig) -> None:
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            shared = any(uses[id(parameter)] > 1 for parameter in layer.get_base_layer().parameters())
            if shared or not isinstance(layer, Linear):
                kind = "shares its weight with another layer" if shared else "is not a plain linear layer"
                raise ConfigError(
                    f"model.lora_targets = {config.lora_targets}: {name.rpartition('.')[2]} {kind}; a push"
                    " could not carry its adapter merged; name linear layers, as q_proj, or [] for all"
                )


def base_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model below the adapters, if there are any."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def merged_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The model's checkpoint by name with the adapters added in float32; the model is left as it is.

    One layer is merged at a time: the whole model in float32 may not fit. Merging in place and back
    would round the frozen weights a little more at every push.
    """
    base = base_of(model)
    adapted = {name: layer for name, layer in base.named_modules() if isinstance(layer, Linear)}
    for name, tensor in base.state_dict().items():
        if LORA in name:
            continue
        owner, _, kind = name.rpartition(".base_layer.")
        if kind == "weight" and owner in adapted:
            with torch.no_grad():
                yield f"{owner}.weight", tensor.float() + adapted[owner].get_delta_weight(ADAPTER).float()
        else:
            yield name.replace(".base_layer.", "."), tensor


def save_adapter(model: PeftModel, directory: Path) -> None:
    """The adapter as peft writes it: AutoModelForCausalLM.from_pretrained loads it with its base."""
    # "auto" would ask the hub whether the vocabulary of the base model has grown.
    model.save_pretrained(str(directory), save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)  # a model card with nothing in it


def load_adapter(model: PeftModel, directory: Path) -> None:
    """The reverse of save_adapter, into adapters of the same shape and scale. Raises ConfigError."""
    ours, wrong = model.peft_config[ADAPTER], []
    try:
        saved = json.loads((directory / "adapter_config.json").read_text())
        for name in ("r", "lora_alpha"):
            if saved[name] != getattr(ours, name):
                wrong.append(f"it has {name} {saved[name]}, the run says {getattr(ours, name)}")
        if not wrong:
            result: Any = set_peft_model_state_dict(model, load_file(directory / WEIGHTS))
            wrong = [*result.unexpected_keys, *(key for key in result.missing_keys if LORA in key)]
    except (OSError, RuntimeError) as error:
        wrong = [first_line(error)]
    if wrong:
        raise ConfigError(
            f"resume = {directory.parent}: its adapter does not fit model.lora_rank, model.lora_alpha and"
            f" model.lora_targets ({wrong[0]}); set what it was trained with, or another output_dir"
        )


def adapter_copy(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the adapters' tensors by name."""
    return {name: tensor.detach().clone() for name, tensor in _adapter(model)}


@contextmanager
def adapter_replaced(model: Any, adapter: dict[str, Tensor] | None) -> Iterator[None]:
    """The model with another adapter, or with none at all, while the context is open."""
    if adapter is None:
        with model.disable_adapter():
            yield
        return
    trained = adapter_copy(model)
    _put(model, adapter)
    try:
        yield
    finally:
        _put(model, trained)


def _put(model: nn.Module, adapter: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in _adapter(model):
            tensor.copy_(adapter[name])


def _adapter(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, tensor) for name, tensor in model.named_parameters() if LORA in name)
