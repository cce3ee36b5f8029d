"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) by peft: train little, push the whole model.

A push carries the merged weights. The engine knows no adapters: it runs its plain kernels, and sleep level 2
may discard its weights.
"""

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
    """Freezes `model`, loaded from `path`, and adds float32 adapters, which change nothing at first.

    Raises ConfigError for layers whose adapter cannot be merged.
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
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings")  # _check_mergeable rejects it
            adapted = get_peft_model(model, adapters)
    except ValueError as error:
        raise ConfigError(
            f"model.lora_targets = {config.lora_targets}: {first_line(error)};"
            " name linear layers of the model, as q_proj, or [] for all of them"
        ) from error
    _check_mergeable(adapted, config)
    # Absolute, so that a saved adapter finds its base from any working directory.
    local = Path(path).exists()
    adapted.peft_config[ADAPTER].base_model_name_or_path = str(Path(path).absolute()) if local else path
    adapted.peft_config[ADAPTER].revision = None if local else config.revision
    return adapted


def _check_mergeable(model: PeftModel, config: ModelConfig) -> None:
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            shared = any(uses[id(parameter)] > 1 for parameter in layer.get_base_layer().parameters())
            if shared or not isinstance(layer, Linear):
                kind = "shares its weight with another layer" if shared else "is not a plain linear layer"
                raise ConfigError(
                    f"model.lora_targets = {config.lora_targets}: {name.rpartition('.')[2]} {kind}; its"
                    " adapter cannot be merged for a push; name linear layers, as q_proj, or [] for all"
                )


def base_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model below any adapters."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def merged_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The model's checkpoint by name, adapters added in float32; the model itself does not change.

    Layers are merged one at a time: the whole model in float32 may not fit. Merging in place and undoing
    it would round the frozen weights at every push.
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
    """Saves the adapter in peft's format: AutoModelForCausalLM.from_pretrained loads it with its base."""
    # The default, "auto", asks the hub whether the base model's vocabulary has grown.
    model.save_pretrained(str(directory), save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)  # an empty model card


def load_adapter(model: PeftModel, directory: Path) -> None:
    """Loads a saved adapter into one of the same shape and scale. Raises ConfigError."""
    ours = model.peft_config[ADAPTER].to_dict()
    try:
        saved = json.loads((directory / "adapter_config.json").read_text())
        scale = [name for name in ("r", "lora_alpha") if saved[name] != ours[name]]
        wrong = [f"it has {name} {saved[name]}, the run {ours[name]}" for name in scale]
        if not wrong:
            result: Any = set_peft_model_state_dict(model, load_file(directory / WEIGHTS))
            wrong = [*result.unexpected_keys, *(key for key in result.missing_keys if LORA in key)]
    except (OSError, RuntimeError) as error:
        wrong = [first_line(error)]
    if wrong:
        raise ConfigError(
            f"resume = {directory.parent}: its adapter does not fit model.lora_rank, model.lora_alpha and"
            f" model.lora_targets ({wrong[0]}); set the values it was trained with, or another output_dir"
        )


def adapter_copy(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the adapters' tensors by name."""
    return {name: tensor.detach().clone() for name, tensor in _adapter(model).items()}


@contextmanager
def adapter_replaced(model: Any, adapter: dict[str, Tensor] | None) -> Iterator[None]:
    """Uses another adapter, or none, while the context is open."""
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
        for name, tensor in _adapter(model).items():
            tensor.copy_(adapter[name])


def _adapter(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.named_parameters() if LORA in name}
