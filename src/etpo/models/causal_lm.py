"""Parts of any causal LM of transformers: the trunk and its last hidden states."""

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
    # Llama 4 has another base_model_prefix
    return model.model if model.base_model is model else model.base_model


def last_hidden_states(trunk: nn.Module, last: int, **inputs: Any) -> Tensor:
    """Run a trunk; return its last hidden states at the last `last` positions, 0: at all."""
    like_mamba = "cache_params" in inspect.signature(trunk.forward).parameters
    if like_mamba and "past_key_values" in inputs:
        inputs["cache_params"] = inputs.pop("past_key_values")
    return trunk(**inputs).last_hidden_state[:, -last:]
