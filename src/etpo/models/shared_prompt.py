"""One forward over prompts and actions in which equal prompts, and equal rows, are computed once.

Works with any causal LM of transformers that keeps keys and values in a `DynamicCache`; gradients
flow through the cache into the prompt. A model with recurrent states runs prompt and action in one
sequence: it cannot go on from a state with several tokens.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.modeling_layers import GradientCheckpointingLayer

# run(last=n, input_ids=..., ...) -> hidden states [b, n, D] at the last n positions; 0: at all
Run = Callable[..., Tensor]


def position_ids(mask: Tensor) -> Tensor:
    """Positions [B, T] that count the tokens of `mask` [B, T]; padding gets position 0."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


class Prefill(NamedTuple):
    """Hidden states [G, 1, D] after each of G distinct prompts, their cache and mask [G, P].

    prompt_index: int64 [B], the distinct prompt of each row.
    """

    hidden_states: Tensor
    cache: DynamicCache
    mask: Tensor
    prompt_index: Tensor


def prefill(run: Run, config: PreTrainedConfig, prompt_ids: Tensor, prompt_mask: Tensor) -> Prefill:
    """Run each distinct prompt of [B, P], padded on the left, once."""
    both = torch.cat([prompt_ids, prompt_mask.long()], dim=1)
    distinct, prompt_index = torch.unique(both, dim=0, return_inverse=True)
    ids, mask = distinct.chunk(2, dim=1)
    cache = DynamicCache(config=config)
    states = run(
        last=1,
        input_ids=ids,
        attention_mask=mask,
        position_ids=position_ids(mask),
        past_key_values=cache,
        use_cache=True,
    )
    return Prefill(states, cache, mask.bool(), prompt_index)


def forward_actions(
    run: Run,
    config: PreTrainedConfig,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    action_ids: Tensor,
    checkpointed: bool = False,
) -> Tensor:
    """Compute hidden states [B, L, D] at the L prefixes of action_ids [B, L].

    The first prefix is the prompt; the last one lacks the last token, which is not read. Prompts
    [B, P] are padded on the left, actions on the right, so that no prefix sees padding. Each of
    the distinct rows is run once: a trained policy writes the same action many times.
    checkpointed: `checkpoint_layers` was applied to the model; then nothing is shared.
    """
    if checkpointed or is_recurrent(config):
        return forward_whole(run, prompt_ids, prompt_mask, action_ids)
    size = prompt_ids.shape[1]
    read = torch.cat([prompt_ids, prompt_mask.long(), action_ids[:, :-1]], dim=1)
    distinct, rows = torch.unique(read, dim=0, return_inverse=True)
    ids, mask, action_ids = distinct.tensor_split([size, 2 * size], dim=1)
    filled = prefill(run, config, ids, mask)
    cache, states = filled.cache, filled.hidden_states[filled.prompt_index]
    cache.reorder_cache(filled.prompt_index)
    length = action_ids.shape[1]
    if length > 0:
        mask = torch.nn.functional.pad(mask, (0, length), value=1)
        following = run(
            last=0,
            input_ids=action_ids,
            attention_mask=mask,
            position_ids=position_ids(mask)[:, -length:],
            past_key_values=cache,
            use_cache=True,
        )
        states = torch.cat([states, following], dim=1)
    return states.index_select(0, rows)


def forward_whole(run: Run, prompt_ids: Tensor, prompt_mask: Tensor, action_ids: Tensor) -> Tensor:
    """As `forward_actions`, prompt and action in one sequence per row."""
    length = action_ids.shape[1]
    mask = torch.nn.functional.pad(prompt_mask, (0, length - 1), value=True)
    return run(
        last=length,
        input_ids=torch.cat([prompt_ids, action_ids[:, :-1]], dim=1),
        attention_mask=mask.long(),
        position_ids=position_ids(mask),
        use_cache=False,
    )


def checkpoint_layers(model: nn.Module) -> bool:
    """Has the layers compute their activations again in the backward pass; False if there are none.

    `model.gradient_checkpointing_enable()` needs `training=True` on the layers, which switches
    their dropout on: here they stay in evaluation mode. Copies of the model do as it does.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        layer.forward = functools.partial(  # type: ignore[method-assign]
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )
    return bool(layers)


def is_recurrent(config: PreTrainedConfig) -> bool:
    """Whether a layer's cache is a recurrent state (Mamba, linear attention, convolutions)."""
    layers = DynamicCache(config=config).layers
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)
