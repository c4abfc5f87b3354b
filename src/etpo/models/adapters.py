"""LoRA adapters that leave the weights under them alone."""

from typing import Any

from omegaconf import OmegaConf
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import ModulesToSaveWrapper
from torch import nn

from etpo.errors import ConfigError, reason

# others read data first, move the weights under the adapter, or change with the length of a prompt
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
    """The model with a LoRA adapter that changes nothing yet; only the adapter is trained.

    settings: of `model.lora`, arguments of `peft.LoraConfig`. Switched off, the adapter leaves the
    model as it was. Raises ConfigError for settings that do not fit the model, and for those with
    which this would not hold.
    """
    config = adapter_config("model.lora", settings)
    with_adapter = _fitted("model.lora", get_peft_model, model, config)
    check_adapter("model.lora", with_adapter)
    return with_adapter


def inject_adapter(model: nn.Module, settings: dict[str, Any]) -> nn.Module:
    """As `add_adapter`, of `critic.lora`, and in the model itself."""
    config = adapter_config("critic.lora", settings)
    if config.modules_to_save or config.trainable_token_indices:
        raise ConfigError("critic.lora: allowed are adapters without weights besides their own")
    with_adapter: nn.Module = _fitted("critic.lora", inject_adapter_in_model, config, model)
    check_adapter("critic.lora", with_adapter)
    return with_adapter


def _fitted(key: str, add: Any, *arguments: Any) -> Any:
    try:
        return add(*arguments)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {reason(error)}") from error


def adapter_config(key: str, settings: dict[str, Any]) -> LoraConfig:
    """The settings of `key` for peft; ConfigError for one that is not allowed."""
    if OmegaConf.is_config(settings):
        settings = OmegaConf.to_container(settings)  # peft wants lists
    settings = {"task_type": "CAUSAL_LM"} | settings
    for name, value in settings.items():
        if name not in ALLOWED and value not in (None, False):
            raise ConfigError(f"{key}.{name}={value}: allowed settings are {', '.join(ALLOWED)}")
        if name in VALUES and value not in VALUES[name]:
            allowed = ", ".join(map(str, VALUES[name])).lower()
            raise ConfigError(f"{key}.{name}={value}: allowed are {allowed}")
    known = {name: value for name, value in settings.items() if name in ALLOWED}
    config: LoraConfig = _fitted(key, lambda: LoraConfig(**known))
    return config


def check_adapter(key: str, model: nn.Module) -> None:
    """Raises ConfigError unless all that is trained is switched off with the adapter."""
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


def without_adapter(model: PeftModel) -> nn.Module:
    """The model under the adapter, taken out of it: `model` is of no use afterwards."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.set_adapter([])  # else peft leaves the trained copy in
    unloaded: nn.Module = model.unload()
    return unloaded
