"""One forward over prompts and actions in which equal prompts, and equal rows, are computed once.

Works with any causal LM of transformers that keeps keys and values in a `DynamicCache`; gradients
flow through the cache into the prompt.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

# run(last=n, input_ids=..., ...) -> tensors [b, n, ...] over the last n positions; 0: over all
Run = Callable[..., tuple[Tensor, ...]]


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer with room for `room` further tokens, which are written in place.

    `DynamicLayer` copies all it holds for every token.
    """

    def __init__(self, layer: DynamicLayer, room: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        batch, heads, size, _ = layer.keys.shape
        self.buffers = [
            torch.cat([states, states.new_empty(batch, heads, room, states.shape[-1])], dim=-2)
            for states in (layer.keys, layer.values)
        ]
        self.show(size)

    def show(self, size: int) -> None:
        """Makes the first `size` tokens of the buffers the cached ones."""
        self.keys, self.values = (buffer[..., :size, :] for buffer in self.buffers)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        size = self.keys.shape[-2]
        end = size + key_states.shape[-2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., size:end, :] = states
        self.show(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        size = self.keys.shape[-2]
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self.show(size)


def preallocate(cache: DynamicCache, room: int) -> None:
    """Gives a filled cache room for `room` more tokens; sliding windows stay as they are."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = PreallocatedLayer(layer, room)


def position_ids(mask: Tensor) -> Tensor:
    """Positions [B, T] that count the tokens of `mask` [B, T]; padding gets position 0."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def encode_prompts(
    run: Run, config: PreTrainedConfig, prompt_ids: Tensor, prompt_mask: Tensor
) -> tuple[tuple[Tensor, ...], DynamicCache]:
    """What `run` says after each prompt [B, P], padded on the left, and a cache of the B prompts.

    Each of the distinct prompts is run once.
    """
    both = torch.cat([prompt_ids, prompt_mask.long()], dim=1)
    distinct, rows = torch.unique(both, dim=0, return_inverse=True)
    ids, mask = distinct.chunk(2, dim=1)
    cache = DynamicCache(config=config)
    parts = run(
        last=1,
        input_ids=ids,
        attention_mask=mask,
        position_ids=position_ids(mask),
        past_key_values=cache,
        use_cache=True,
    )
    cache.batch_select_indices(rows)
    return tuple(part[rows] for part in parts), cache


def forward_actions(
    run: Run, config: PreTrainedConfig, prompt_ids: Tensor, prompt_mask: Tensor, action_ids: Tensor
) -> tuple[Tensor, ...]:
    """What `run` says at the L prefixes of action_ids [B, L]: tensors [B, L, ...].

    The first prefix is the prompt; the last one lacks the last token, which is not read. Prompts
    [B, P] are padded on the left, actions on the right, so that no prefix sees padding. Each of
    the distinct rows is run once: a trained policy writes the same action many times.
    """
    size = prompt_ids.shape[1]
    read = torch.cat([prompt_ids, prompt_mask.long(), action_ids[:, :-1]], dim=1)
    distinct, rows = torch.unique(read, dim=0, return_inverse=True)
    ids, mask, action_ids = distinct.tensor_split([size, 2 * size], dim=1)
    parts, cache = encode_prompts(run, config, ids, mask)
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
        parts = tuple(torch.cat(pair, dim=1) for pair in zip(parts, following, strict=True))
    return tuple(part.index_select(0, rows) for part in parts)
