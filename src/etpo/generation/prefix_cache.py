"""Decode tokens of many rows with a key-value cache, many rows on one prompt.

With `SharedPrefixCache` the prompt's part of attention is one matrix product for all rows on it,
and a prompt is held once. `PerRowCache` holds it for every row, as keys and values or as recurrent
states; it serves any causal LM with a `DynamicCache`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from etpo.generation.prompt_cache import PromptCache
from etpo.models.causal_lm import last_hidden_states
from etpo.models.shared_prompt import Prefill, position_ids, prefill

ATTENTION = "etpo_shared_prefix"
# arguments of an attention function that do not change what is computed here
NEUTRAL = {"dropout", "sliding_window", "position_ids", "use_cache", "is_causal"}
NEUTRAL |= {"cache_position", "output_attentions", "output_hidden_states"}


class PreallocatedLayer(DynamicLayer):
    """One layer's keys and values; writes a token in place, where `DynamicLayer` copies all."""

    def __init__(self, keys: Tensor, values: Tensor, max_new_tokens: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.buffers = [
            torch.cat([x, x.new_empty(*x.shape[:2], max_new_tokens, x.shape[-1])], dim=-2)
            for x in (keys, values)
        ]
        self.set_length(keys.shape[-2])

    def set_length(self, length: int) -> None:
        """Make the first `length` tokens of the buffers the cached ones."""
        self.keys, self.values = (buffer[..., :length, :] for buffer in self.buffers)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        length = self.keys.shape[-2]
        end = length + key_states.shape[-2]
        if end > self.buffers[0].shape[-2]:  # padding of tokens that are read together
            self.buffers = [
                torch.cat([b, b.new_empty(*b.shape[:2], end, b.shape[-1])], -2)
                for b in self.buffers
            ]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., length:end, :] = states
        self.set_length(end)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        length = self.keys.shape[-2]
        self.buffers = [buffer[beam_idx] for buffer in self.buffers]
        self.set_length(length)


class PerRowCache(DynamicCache):
    """Prompt and action of each of B rows; arguments and `order` as of `SharedPrefixCache`."""

    def __init__(self, prefilled: Prefill, max_new_tokens: int) -> None:
        super().__init__()
        self.layers = prefilled.cache.layers
        self.reorder_cache(prefilled.prompt_index)  # of recurrent states too
        for index, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:  # sliding windows and recurrent states stay
                self.layers[index] = PreallocatedLayer(layer.keys, layer.values, max_new_tokens)
        self.order = torch.arange(len(prefilled.prompt_index), device=prefilled.mask.device)

    def select_rows(self, rows: Tensor) -> Tensor:
        """Keep `rows` [b] only; return them in the cache's order."""
        self.reorder_cache(rows)
        return rows


class SharedPrefixCache(DynamicCache):
    """Keys and values of G distinct prompts, and of one action for each of B rows.

    order: int64 [B], the given row at each place of the cache. buckets: ranges of prompts that have
    equally many rows, each with the range of these rows.
    """

    def __init__(self, prefilled: Prefill, max_new_tokens: int) -> None:
        super().__init__()
        self.mask = prefilled.mask
        self.visible: Tensor | None = None
        self.prompts = [(layer.keys, layer.values) for layer in prefilled.cache.layers]
        self.order = self.regroup(prefilled.prompt_index)
        shape = len(self.order), -1, -1, -1
        for pair in self.prompts:
            empty = (states[:1, :, :0].expand(shape) for states in pair)
            self.layers.append(PreallocatedLayer(*empty, max_new_tokens))

    def regroup(self, prompt_index: Tensor) -> Tensor:
        """Sort rows into buckets and drop prompts without a row; return the rows' order [B]."""
        used, prompt_index, counts = prompt_index.unique(return_inverse=True, return_counts=True)
        by_count = counts.argsort(stable=True)
        used, counts = used[by_count], counts[by_count]
        prompt_index = by_count.argsort()[prompt_index]
        self.mask = self.mask[used]
        self.padded = not bool(self.mask.all())
        self.prompts = [(keys[used], values[used]) for keys, values in self.prompts]
        order = prompt_index.argsort(stable=True)
        self.prompt_index = prompt_index[order]
        self.buckets: list[tuple[slice, slice]] = []
        prompt = row = 0
        for count, prompts in zip(*counts.unique(return_counts=True), strict=True):
            ends = prompt + int(prompts), row + int(prompts * count)
            self.buckets.append((slice(prompt, ends[0]), slice(row, ends[1])))
            prompt, row = ends
        return order

    def set_visible(self, mask: Tensor, length: int) -> None:
        """Set which tokens of the actions the next `length` tokens attend to.

        mask: bool [B, P + S], with the next tokens. `visible`: bool [B, length, S], None for all.
        """
        seen = mask[:, self.mask.shape[1] :]
        self.visible = None
        if length > 1 or not bool(seen.all()):
            size = seen.shape[1]
            key = torch.arange(size, device=mask.device)
            self.visible = seen[:, None] & (key <= key[size - length :, None])

    def select_rows(self, rows: Tensor) -> Tensor:
        """Keep `rows` [b] only; return them in the cache's order."""
        rows = rows[self.regroup(self.prompt_index[rows])]
        self.reorder_cache(rows)
        return rows


class Decoder:
    """Decode one action for each row of prompts [B, P], padded on the left.

    `prompt_cache` has former prompts and keeps these; it is used if `shared`.

    rows: int64 [b], the rows that are decoded, in the cache's order. hidden_states: [b, 1, D], the
    last ones of each. shared: whether `cache` is a `SharedPrefixCache`, which `share_prefixes`
    allows and a sliding window that is too small prevents.
    """

    def __init__(
        self,
        trunk: nn.Module,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        max_new_tokens: int,
        share_prefixes: bool,
        prompt_cache: PromptCache | None = None,
    ) -> None:
        self.trunk = trunk
        size = prompt_ids.shape[1] + max_new_tokens
        self.shared = share_prefixes and all(
            type(layer) is DynamicLayer
            or (type(layer) is DynamicSlidingWindowLayer and size <= layer.sliding_window)
            for layer in DynamicCache(config=trunk.config).layers
        )
        keep = self.shared and prompt_cache is not None
        fill = prompt_cache.prefill if keep else prefill
        prefilled = fill(trunk, prompt_ids, prompt_mask)
        self.cache = (SharedPrefixCache if self.shared else PerRowCache)(prefilled, max_new_tokens)
        self.rows = self.cache.order
        self.mask = prompt_mask[self.rows]
        self.hidden_states = prefilled.hidden_states[prefilled.prompt_index[self.rows]]

    def step(self, tokens: Tensor, seen: Tensor) -> None:
        """Append `tokens` [b, s] to the rows; `seen` [b, s] is false for padding on the left."""
        self.mask = torch.cat([self.mask, seen], dim=1)
        if isinstance(self.cache, SharedPrefixCache):
            self.cache.set_visible(self.mask, tokens.shape[1])
        with shared_attention(self.trunk.config, self.cache) as options:
            self.hidden_states = last_hidden_states(
                self.trunk,
                last=1,
                input_ids=tokens,
                attention_mask=self.mask.long(),
                position_ids=position_ids(self.mask)[:, -tokens.shape[1] :],
                past_key_values=self.cache,
                use_cache=True,
                **options,
            )

    def select_rows(self, selected: Tensor) -> Tensor:
        """Decode the rows of `selected` (bool [b]) only; return their former places."""
        places = self.cache.select_rows(selected.nonzero()[:, 0])
        self.rows, self.mask = self.rows[places], self.mask[places]
        return places


@contextmanager
def shared_attention(
    config: PreTrainedConfig, cache: PerRowCache | SharedPrefixCache
) -> Iterator[dict[str, Any]]:
    """Let models of this configuration attend to a shared cache; yield options of their forward."""
    if not isinstance(cache, SharedPrefixCache):
        yield {}
        return
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield {"shared_prefix": cache}
    finally:
        config._attn_implementation = before


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    shared_prefix: SharedPrefixCache,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend from T tokens per row to its prompt and the S tokens of its action.

    query: [B, H, T, D]; key, value: [B, K, S, D], H a multiple of K -> [B, T, H, D]. The softmax is
    over both parts, in float32. Raises NotImplementedError for an argument of another attention.
    """
    unknown = {name for name, x in others.items() if x is not None} - NEUTRAL
    if unknown or attention_mask is not None:
        raise NotImplementedError(f"attention with {unknown or 'a mask'}")
    prompt_keys, prompt_values = shared_prefix.prompts[module.layer_idx]
    batch, heads, length, size = query.shape
    groups = key.shape[1]
    query = query.reshape(batch, groups, heads // groups * length, size) * scaling
    width = prompt_keys.shape[2]
    scores = query.new_empty(*query.shape[:3], width + key.shape[2])  # [B, K, H / K * T, P + S]
    scores[..., width:] = query @ key.transpose(2, 3)
    for prompts, rows in shared_prefix.buckets:  # G prompts with n rows each
        keys = prompt_keys[prompts]
        grouped = query[rows].unflatten(0, (len(keys), -1))
        scores[rows, ..., :width] = torch.einsum("gnkhd,gkpd->gnkhp", grouped, keys).flatten(0, 1)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if shared_prefix.padded:
        mask = shared_prefix.mask[shared_prefix.prompt_index]
        scores[..., :width].masked_fill_(~mask[:, None, None], float("-inf"))
    if shared_prefix.visible is not None:
        hidden = ~shared_prefix.visible[:, None, None]
        per_head = scores[..., width:].unflatten(2, (heads // groups, length))
        per_head.masked_fill_(hidden, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    output = weights[..., width:] @ value
    for prompts, rows in shared_prefix.buckets:
        values = prompt_values[prompts]
        grouped = weights[rows, ..., :width].unflatten(0, (len(values), -1))
        output[rows] += torch.einsum("gnkhp,gkpd->gnkhd", grouped, values).flatten(0, 1)
    return output.view(batch, heads, length, -1).transpose(1, 2), None


AttentionInterface.register(ATTENTION, shared_prefix_attention)
