"""Compute each distinct prompt of a batch once, and keep its keys and values for decoding."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from etpo.models.causal_lm import last_hidden_states


def position_ids(mask: Tensor) -> Tensor:
    """Return positions [B, T] that count the tokens of `mask` [B, T]; padding gets position 0."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


class Prefill(NamedTuple):
    """Hidden states [G, 1, D] after each of G distinct prompts, their cache and mask [G, P].

    prompt_index: int64 [B], the distinct prompt of each row.
    """

    hidden_states: Tensor
    cache: DynamicCache
    mask: Tensor
    prompt_index: Tensor


def prefill(trunk: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor) -> Prefill:
    """Run each distinct prompt of [B, P], padded on the left, once."""
    both = torch.cat([prompt_ids, prompt_mask.long()], dim=1)
    distinct, prompt_index = torch.unique(both, dim=0, return_inverse=True)
    ids, mask = distinct.chunk(2, dim=1)
    cache = DynamicCache(config=trunk.config)
    states = last_hidden_states(
        trunk,
        last=1,
        input_ids=ids,
        attention_mask=mask,
        position_ids=position_ids(mask),
        past_key_values=cache,
        use_cache=True,
    )
    return Prefill(states, cache, mask.bool(), prompt_index)
