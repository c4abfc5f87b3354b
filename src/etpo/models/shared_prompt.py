"""Compute hidden states of prompts and actions, equal prompts and equal rows once.

Works with any causal LM of transformers that keeps keys and values in a `DynamicCache`; gradients
flow through the cache into the prompt. A model with recurrent states computes prompt and action as
one sequence, because it cannot continue from a state with several tokens.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.modeling_layers import GradientCheckpointingLayer

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


def forward_actions(
    trunk: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    action_ids: Tensor,
    checkpointed: bool = False,
) -> Tensor:
    """Compute hidden states [B, L, D] at the L prefixes of action_ids [B, L].

    The first prefix is the prompt; the last one lacks the last token, which is not read. Prompts
    [B, P] are padded on the left, actions on the right, so that no prefix sees padding. Each of
    the distinct rows is computed once: a trained policy repeats actions. checkpointed:
    `checkpoint_layers` was applied to the model; then nothing is shared.
    """
    if checkpointed or is_recurrent(trunk.config):
        return forward_whole(trunk, prompt_ids, prompt_mask, action_ids)
    size = prompt_ids.shape[1]
    read = torch.cat([prompt_ids, prompt_mask.long(), action_ids[:, :-1]], dim=1)
    distinct, rows = torch.unique(read, dim=0, return_inverse=True)
    ids, mask, action_ids = distinct.tensor_split([size, 2 * size], dim=1)
    filled = prefill(trunk, ids, mask)
    counts = filled.prompt_index.bincount().tolist()  # distinct rows are sorted by prompt
    cache, states = filled.cache, repeat_rows(filled.hidden_states, counts)
    for layer in cache.layers:
        layer.keys, layer.values = (repeat_rows(x, counts) for x in (layer.keys, layer.values))
    length = action_ids.shape[1]
    if length > 0:
        mask = torch.nn.functional.pad(mask, (0, length), value=1)
        following = last_hidden_states(
            trunk,
            last=0,
            input_ids=action_ids,
            attention_mask=mask,
            position_ids=position_ids(mask)[:, -length:],
            past_key_values=cache,
            use_cache=True,
        )
        states = torch.cat([states, following], dim=1)
    return states.index_select(0, rows)


def repeat_rows(x: Tensor, counts: list[int]) -> Tensor:
    """Repeat row g of [G, ...] `counts[g]` times; the backward sums where an index scatters."""
    parts = [row.expand(n, *row.shape[1:]) for row, n in zip(x.split(1), counts, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def forward_whole(
    trunk: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, action_ids: Tensor
) -> Tensor:
    """Compute `forward_actions` with prompt and action in one sequence per row."""
    length = action_ids.shape[1]
    mask = torch.nn.functional.pad(prompt_mask, (0, length - 1), value=True)
    return last_hidden_states(
        trunk,
        last=length,
        input_ids=torch.cat([prompt_ids, action_ids[:, :-1]], dim=1),
        attention_mask=mask.long(),
        position_ids=position_ids(mask),
        use_cache=False,
    )


def checkpoint_layers(model: nn.Module) -> bool:
    """Recompute the layers' activations in the backward pass; return False without such layers.

    `model.gradient_checkpointing_enable()` needs `training=True`, which turns dropout on; here the
    layers stay in evaluation mode. Copies of the model are checkpointed too.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        layer.forward = functools.partial(  # type: ignore[method-assign]
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )
    return bool(layers)


def is_recurrent(config: PreTrainedConfig) -> bool:
    """Return whether a layer's cache is recurrent (Mamba, linear attention, convolution)."""
    layers = DynamicCache(config=config).layers
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)
