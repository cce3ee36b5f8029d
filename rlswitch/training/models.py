"""Loads the trainer's networks: the policy, the critic, a frozen copy."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from rlswitch.config.sections import ModelConfig
from rlswitch.data.hub import check_fits_context, read_config, unreadable
from rlswitch.errors import ConfigError
from rlswitch.run import Run
from rlswitch.text import first_line
from rlswitch.training import lora
from rlswitch.training.batching import lay_out
from rlswitch.types import Batch


class Critic(nn.Module):
    """A value model: the policy's backbone with a scalar head that starts at zero."""

    def __init__(self, backbone: nn.Module, packed: bool):
        super().__init__()
        self.backbone, self.packed = backbone, packed
        self.head = nn.Linear(lora.base_of(backbone).config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch) -> Tensor:
        """Value [B, T] of the state before each learned token, zero off the loss mask."""
        layout = lay_out(batch, self.packed)
        hidden = self.backbone(**layout.inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        with torch.autocast(hidden.device.type, enabled=False):  # bfloat16 would round every value
            values = self.head(hidden[layout.positions].float()).squeeze(-1)
        return layout.spread(values, batch)


def outline(
    model: ModelConfig, path: str, key: str = "model.path", kind: Any = AutoModelForCausalLM
) -> PreTrainedModel:
    """The model of setting `key` on the meta device: names and shapes, no weights. Raises ConfigError."""
    config = read_config(model, path, key)
    try:
        with torch.device("meta"):
            return kind.from_config(
                config,
                attn_implementation=model.attn_implementation,
                trust_remote_code=model.trust_remote_code,
            )
    except Exception as error:  # a configuration or a model's own code can raise anything
        named = isinstance(error, ImportError) or "attn_implementation" in str(error)
        if model.attn_implementation and named:
            raise _attention_error(model, error) from error
        raise unreadable(model, key, error) from error


def check_model(run: Run, path: str) -> None:
    """Raises ConfigError if the trainer could not build the model, adapters included."""
    model = outline(run.model, path)
    check_fits_context(run, model.config)
    if run.model.lora_rank:
        lora.add_adapters(model, run.model, path, causal=True)


def load_trained(run: Run, path: str, frozen_dtype: torch.dtype, *, causal: bool) -> nn.Module:
    """A network in float32: in bfloat16 small updates would be lost. With or without its language-model head.

    With LoRA the weights are frozen, in `frozen_dtype`, and the adapters in float32.
    """
    dtype = frozen_dtype if run.model.lora_rank else torch.float32
    model: nn.Module = load_model(run.model, path, dtype, causal=causal)
    if run.model.lora_rank:
        model = lora.add_adapters(model, run.model, path, causal=causal)
    if run.trainer.gradient_checkpointing:
        checkpoint_gradients(model)
    return model


def load_model(config: ModelConfig, path: str, dtype: torch.dtype, *, causal: bool) -> PreTrainedModel:
    """The model in `path`, with or without its language-model head. Raises ConfigError."""
    try:
        return (AutoModelForCausalLM if causal else AutoModel).from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=config.attn_implementation,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,  # loading a pickle could run code
        )
    except ImportError as error:  # flash_attention_2 without its package
        raise _attention_error(config, error) from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.path = {path}: cannot be loaded: {first_line(error)}; set a directory or hub id with"
            " config.json and *.safetensors"
        ) from error


def _attention_error(config: ModelConfig, error: Exception) -> ConfigError:
    return ConfigError(
        f"model.attn_implementation = {config.attn_implementation}: {first_line(error)}; install it, or set"
        " null"
    )


def checkpoint_gradients(model: nn.Module) -> None:
    """Recomputes activations in the backward pass instead of keeping them, and disables dropout.

    transformers recomputes in training mode only, where dropout would act.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):  # torch.nn.functional.dropout and layerdrop
                setattr(module, name, 0.0)
    base = lora.base_of(model)
    base.gradient_checkpointing_enable()
    if base is not model:
        base.enable_input_require_grads()  # frozen embeddings would cut off the adapters' gradients
