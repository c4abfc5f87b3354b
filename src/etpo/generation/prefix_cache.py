"""Caches of keys and values for decoding one action per row, many rows on one prompt.

With `SharedPrompts` the prompt's part of attention is one matrix product for all rows on it, and a
prompt is held once. `ExpandedPrompts` holds it for every row, as keys and values or as recurrent
states; any causal LM with a `DynamicCache` can use that.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from etpo.models.shared_prompt import Prefill, Run, position_ids

ATTENTION = "etpo_shared_prompts"
# their attention is scaled and causal, nothing else
MODEL_TYPES = ("llama", "qwen2", "starcoder2")


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer with room for `room` further tokens, which are written in place.

    `DynamicLayer` copies all it holds for every token.
    """

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        batch, heads, size, _ = keys.shape
        self.buffers = [
            torch.cat([states, states.new_empty(batch, heads, room, states.shape[-1])], dim=-2)
            for states in (keys, values)
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

    def reorder_cache(self, beam_idx: Tensor) -> None:
        size = self.keys.shape[-2]
        self.buffers = [buffer[beam_idx] for buffer in self.buffers]
        self.show(size)


class ExpandedPrompts(DynamicCache):
    """Prompt and action of each of B rows; arguments and attributes as of `SharedPrompts`."""

    def __init__(self, filled: Prefill, room: int) -> None:
        super().__init__()
        self.layers = filled.cache.layers
        self.reorder_cache(filled.prompt_index)  # unlike batch_select_indices, recurrent states too
        for index, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:  # sliding windows and recurrent states stay
                self.layers[index] = PreallocatedLayer(layer.keys, layer.values, room)
        self.order = torch.arange(len(filled.prompt_index), device=filled.prompt_index.device)
        self.inputs: dict[str, Any] = {}

    def attention(self, config: PreTrainedConfig) -> AbstractContextManager[None]:
        """The model attends as ever."""
        return nullcontext()

    def keep(self, rows: Tensor) -> Tensor:
        """Drops all rows but `rows` [b]; returns these."""
        self.reorder_cache(rows)
        return rows


class Bucket(NamedTuple):
    """Prompts (a range) that have equally many rows, and the range of these rows."""

    prompts: slice
    rows: slice


class SharedPrompts(DynamicCache):
    """Keys and values of G distinct prompts, and of one action for each of B rows.

    room: tokens that an action may have. Rows are kept in an order of their own: `order` int64 [B]
    says which of the given rows comes where. `inputs` are for the model's forward, within
    `attention`.
    """

    def __init__(self, filled: Prefill, room: int) -> None:
        super().__init__()
        self.mask = filled.mask
        self.prompts = [(layer.keys, layer.values) for layer in filled.cache.layers]
        self.order = self.regroup(filled.prompt_index)
        none = [keys[:1, :, :0].expand(len(self.order), -1, -1, -1) for keys, _ in self.prompts]
        self.layers = [PreallocatedLayer(empty, empty, room) for empty in none]
        self.inputs = {"shared_prompts": self}

    @contextmanager
    def attention(self, config: PreTrainedConfig) -> Iterator[None]:
        """Within it, models of this configuration attend as `attend` does."""
        before = config._attn_implementation
        config._attn_implementation = ATTENTION
        try:
            yield
        finally:
            config._attn_implementation = before

    def regroup(self, prompt_of: Tensor) -> Tensor:
        """Sorts rows into buckets, drops prompts without a row; returns the rows' order [B]."""
        used, prompt_of, counts = prompt_of.unique(return_inverse=True, return_counts=True)
        by_count = counts.argsort(stable=True)
        used, counts = used[by_count], counts[by_count]
        prompt_of = by_count.argsort()[prompt_of]
        self.mask = self.mask[used]
        self.padded = not bool(self.mask.all())
        self.prompts = [(keys[used], values[used]) for keys, values in self.prompts]
        order = prompt_of.argsort(stable=True)
        self.prompt_of = prompt_of[order]
        self.buckets = []
        prompt = row = 0
        for count, prompts in zip(*counts.unique(return_counts=True), strict=True):
            ends = prompt + int(prompts), row + int(prompts * count)
            self.buckets.append(Bucket(slice(prompt, ends[0]), slice(row, ends[1])))
            prompt, row = ends
        return order

    def keep(self, rows: Tensor) -> Tensor:
        """Drops all rows but `rows` [b]; returns these in the order that they now have."""
        rows = rows[self.regroup(self.prompt_of[rows])]
        self.reorder_cache(rows)
        return rows


def decoding_cache(
    config: PreTrainedConfig, filled: Prefill, room: int
) -> SharedPrompts | ExpandedPrompts:
    """The cache for up to `room` tokens after the encoded prompts: shared where it can be."""
    layers = filled.cache.layers
    size = filled.mask.shape[1] + room
    windows = [x.sliding_window for x in layers if isinstance(x, DynamicSlidingWindowLayer)]
    if config.model_type in MODEL_TYPES and all(size <= window for window in windows):
        return SharedPrompts(filled, room)
    return ExpandedPrompts(filled, room)


def run_next(
    run: Run,
    config: PreTrainedConfig,
    cache: SharedPrompts | ExpandedPrompts,
    token: Tensor,
    mask: Tensor,
) -> Tensor:
    """Run one more token [b] per row; return hidden states [b, 1, D].

    mask: bool [b, T], of all tokens up to this one.
    """
    with cache.attention(config):
        return run(
            last=1,
            input_ids=token[:, None],
            attention_mask=mask.long(),
            position_ids=position_ids(mask)[:, -1:],
            past_key_values=cache,
            use_cache=True,
            **cache.inputs,
        )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    shared_prompts: SharedPrompts,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one token per row, over its prompt and the S tokens of its action.

    query: [B, H, 1, D]; key, value: [B, K, S, D], H a multiple of K -> [B, 1, H, D]. The softmax is
    over both parts, in float32. For `transformers.AttentionInterface`.
    """
    prompt_keys, prompt_values = shared_prompts.prompts[module.layer_idx]
    batch, heads, _, size = query.shape
    groups = key.shape[1]
    query = query.view(batch, groups, heads // groups, size) * scaling
    width = prompt_keys.shape[2]
    scores = query.new_empty(*query.shape[:3], width + key.shape[2])  # [B, K, H / K, P + S]
    scores[..., width:] = query @ key.transpose(2, 3)
    for prompts, rows in shared_prompts.buckets:
        keys = prompt_keys[prompts].transpose(2, 3)
        scores[rows, ..., :width] = apart(together(query[rows], len(keys)) @ keys, query[rows])
    if shared_prompts.padded:
        mask = shared_prompts.mask[shared_prompts.prompt_of]
        scores[..., :width].masked_fill_(~mask[:, None, None], float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    output = weights[..., width:] @ value
    for prompts, rows in shared_prompts.buckets:
        values = prompt_values[prompts]
        output[rows] += apart(
            together(weights[rows, ..., :width], len(values)) @ values, query[rows]
        )
    return output.view(batch, 1, heads, size), None


def together(states: Tensor, prompts: int) -> Tensor:
    """[G n, K, R, X] of G prompts with n rows each -> [G, K, n R, X]."""
    _, groups, repeats, size = states.shape
    states = states.view(prompts, -1, groups, repeats, size).transpose(1, 2)
    return states.reshape(prompts, groups, -1, size)


def apart(states: Tensor, like: Tensor) -> Tensor:
    """The inverse of `together`, `like` [G n, K, R, ...]: [G, K, n R, X] -> [G n, K, R, X]."""
    rows, groups, repeats, _ = like.shape
    states = states.view(len(states), groups, -1, repeats, states.shape[-1]).transpose(1, 2)
    return states.reshape(rows, groups, repeats, -1)


AttentionInterface.register(ATTENTION, attend)
