"""Parts of any causal LM of transformers: the trunk, its last hidden states and its forward."""

import inspect
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel


def trunk_of(model: nn.Module) -> nn.Module:
    """Return a causal LM without its LM head; an adapter in it stays active."""
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    assert isinstance(model, PreTrainedModel)
    found: nn.Module = model.base_model
    return found if found is not model else model.model  # Llama 4 has another base_model_prefix


def last_hidden_states(trunk: nn.Module, last: int, **inputs: Any) -> Tensor:
    """Run a trunk; return its last hidden states at the last `last` positions, 0: at all."""
    if "past_key_values" in inputs and takes_cache_params(trunk):
        inputs["cache_params"] = inputs.pop("past_key_values")
    states: Tensor = trunk(**inputs).last_hidden_state
    return states[:, -last:]


def takes_cache_params(trunk: nn.Module) -> bool:
    """Return whether the cache is an argument `cache_params`, as in Mamba."""
    return "cache_params" in inspect.signature(trunk.forward).parameters
