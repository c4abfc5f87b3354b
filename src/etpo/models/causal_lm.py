"""Forwards of any causal LM of transformers, with its output layer or without."""

import inspect
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel


def language_model(model: nn.Module, last: int, **inputs: Any) -> tuple[Tensor, Tensor]:
    """Logits and features of a causal LM at the last `last` positions; 0: at all."""
    if "past_key_values" in inputs and takes_state(model):
        inputs["cache_params"] = inputs.pop("past_key_values")
    features: list[Tensor] = []
    # what its output layer reads; `output_hidden_states` would hold those of all layers
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, read: features.append(read[0])
    )
    try:
        logits = model(**inputs, logits_to_keep=last).logits
    finally:
        hook.remove()
    return logits, features[0]


def trunk(model: nn.Module, last: int, **inputs: Any) -> tuple[Tensor]:
    """Features of a causal LM at the last `last` positions, an adapter included; 0: at all."""
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    return (trunk_of(model)(**inputs).last_hidden_state[:, -last:],)


def trunk_of(model: PreTrainedModel) -> nn.Module:
    """A causal LM without its output layer."""
    found = model.base_model
    return found if found is not model else model.model  # Llama 4 misnames its own


def takes_state(model: nn.Module) -> bool:
    """Whether a causal LM names its cache as Mamba does."""
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    return "cache_params" in inspect.signature(model.forward).parameters
