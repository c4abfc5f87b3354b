"""LoRA adapters that do not change the weights under them."""

from collections.abc import Callable
from typing import Any, TypeVar

from omegaconf import OmegaConf
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import ModulesToSaveWrapper
from torch import nn

from etpo.errors import ConfigError, reason

Adapted = TypeVar("Adapted", bound=nn.Module)

# other settings read data first, change the base weights, or depend on the length of a prompt
ALLOWED = (
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora"),
    *("target_modules", "exclude_modules", "target_parameters", "fan_in_fan_out"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    *("modules_to_save", "trainable_token_indices", "ensure_weight_tying"),
    *("bias", "init_lora_weights", "task_type"),
)
VALUES = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian"),
    "lora_dropout": (0.0,),  # dropout is off in every forward
    "task_type": ("CAUSAL_LM",),
}


def add_adapter(model: nn.Module, settings: dict[str, Any]) -> PeftModel:
    """Wrap the model in a LoRA adapter, which alone is trained and initially changes no output.

    Args:
        model: Computes the same as before while the adapter is disabled.
        settings: `model.lora`, arguments of `peft.LoraConfig`.

    Raises:
        ConfigError: the settings do not fit the model, or would train more than the adapter.
    """
    return _adapt("model.lora", settings, lambda config: get_peft_model(model, config))


def inject_adapter(model: nn.Module, settings: dict[str, Any]) -> nn.Module:
    """Add the adapter of `critic.lora` to the layers of the model; otherwise as `add_adapter`."""
    if settings.get("modules_to_save") or settings.get("trainable_token_indices"):
        raise ConfigError("critic.lora: allowed are adapters without weights besides their own")
    return _adapt("critic.lora", settings, lambda config: inject_adapter_in_model(config, model))


def _adapt(key: str, settings: dict[str, Any], add: Callable[[LoraConfig], Adapted]) -> Adapted:
    """Return `add(config)`; raise ConfigError unless disabling the adapter restores the model."""
    settings = check_settings(key, settings)
    try:
        model = add(LoraConfig(**settings))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {reason(error)}") from error
    switched = {
        id(parameter)
        for module in model.modules()
        for name in getattr(module, "adapter_layer_names", ())
        for parameter in module.get_submodule(name).parameters()
    }
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    strange = next((name for name, p in trained.items() if id(p) not in switched), None)
    if strange is not None or not trained:
        raise ConfigError(f"{key}: would train {strange or 'nothing'}; allowed is an adapter alone")
    return model


def check_settings(key: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `LoraConfig`; raise ConfigError if one is not allowed."""
    if OmegaConf.is_config(settings):
        settings = OmegaConf.to_container(settings)  # peft wants lists
    settings = {"task_type": "CAUSAL_LM"} | settings
    for name, value in settings.items():
        if name not in ALLOWED and value not in (None, False):
            raise ConfigError(f"{key}.{name}={value}: allowed settings are {', '.join(ALLOWED)}")
        if name in VALUES and value not in VALUES[name]:
            allowed = ", ".join(map(str, VALUES[name])).lower()
            raise ConfigError(f"{key}.{name}={value}: allowed are {allowed}")
    return {name: value for name, value in settings.items() if name in ALLOWED}


def without_adapter(model: PeftModel) -> nn.Module:
    """Remove the adapter and return the base model; `model` cannot be used afterwards."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.set_adapter([])  # otherwise peft leaves the trained copy in
    return model.unload()
