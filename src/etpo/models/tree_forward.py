"""Compute hidden states on a tree of prefixes: each distinct token once, with one or few forwards.

A token attends to its ancestors only (a mask of four dimensions), at its depth as position, so that
states and gradients equal the ones of separate sequences. Tree attention for decoding is described
in SpecInfer (arXiv 2305.09781); here it also carries gradients.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
    get_layer_types_and_kwargs,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from etpo.models.causal_lm import last_hidden_states
from etpo.models.prefix_tree import Nodes, PrefixTree, Stage

FORWARD_TOKENS = 16384  # limit of a forward without gradient, padding included


class ContextLayer(DynamicLayer):
    """Keys and values [R, H, P, D] of a stage's contexts; `new` are the ones of its own tokens."""

    def __init__(self, context: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self.is_initialized = True
        self.context = context
        self.new: tuple[Tensor, Tensor]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        self.new = key_states, value_states  # again when a checkpointed layer is recomputed
        if self.context is None:
            return self.new
        keys, values = self.context
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_seq_length(self) -> int:
        return 0 if self.context is None else self.context[0].shape[-2]


class TreeStates:
    """Hidden states, keys and values of the nodes computed so far, in the order of computation."""

    def __init__(self, num_nodes: int, device: torch.device) -> None:
        self.place = torch.zeros(num_nodes, dtype=torch.long, device=device)
        self.count = 0
        self.hidden: list[Tensor] = []  # [n, D] each
        self.layers: list[tuple[list[Tensor], list[Tensor]]] = []  # keys and values [n, H, D]

    def cache(self, config: PreTrainedConfig, context: Tensor) -> DynamicCache:
        """Return a cache that holds the contexts [R, P]; padding repeats some node."""
        cache = DynamicCache(config=config)
        if context.shape[1] == 0:
            cache.layers = [ContextLayer(None) for _ in cache.layers]
            return cache
        places = self.place[context.clamp(min=0)]
        shape = places.shape
        for layer in self.layers:
            for index, parts in enumerate(layer):
                layer[index][:] = [torch.cat(parts)]
        cache.layers = [
            ContextLayer(
                tuple(
                    x.index_select(0, places.flatten()).unflatten(0, shape).transpose(1, 2)
                    for (x,) in layer
                )
            )
            for layer in self.layers
        ]
        return cache

    def append(self, nodes: Tensor, hidden: Tensor, cache: DynamicCache | None) -> None:
        """Store the states [R, T, D] of `nodes` [R, T], and keys and values of `cache`."""
        rows = (nodes.flatten() >= 0).nonzero()[:, 0]
        numbers = torch.arange(self.count, self.count + len(rows), device=nodes.device)
        self.place[nodes.flatten()[rows]] = numbers
        self.count += len(rows)
        self.hidden.append(hidden.flatten(0, 1).index_select(0, rows))
        if cache is not None:
            self.layers = self.layers or [([], []) for _ in cache.layers]
            for kept, layer in zip(self.layers, cache.layers, strict=True):
                for parts, x in zip(kept, layer.new, strict=True):
                    parts.append(x.transpose(1, 2).flatten(0, 1).index_select(0, rows))


def forward_tree(trunk: nn.Module, tree: PrefixTree, packed: bool = True) -> Tensor:
    """Compute the last hidden states [N, D] of the prefixes of `tree`.

    Works with gradient checkpointing. `packed` needs a model that reads a mask of four dimensions
    and has no recurrent states; otherwise every path from a root to a leaf is one sequence.
    """
    states = TreeStates(len(tree.nodes.token), tree.nodes.token.device)
    if not packed:
        for part in split(Stage(tree.paths, tree.paths[:, :0])):
            forward_paths(trunk, tree, part.nodes, states)
    stages = tree.nodes.stages if packed else ()
    for number, stage in enumerate(stages):
        later = number + 1 < len(stages)  # stages that read the keys and values
        for part in split(stage):
            forward_stage(trunk, tree.nodes, part, states, later)
    return torch.cat(states.hidden)[states.place[tree.node]]


def forward_paths(trunk: nn.Module, tree: PrefixTree, nodes: Tensor, states: TreeStates) -> None:
    """Run paths [R, W] as separate sequences and append their states."""
    hidden = last_hidden_states(
        trunk,
        last=0,
        input_ids=tree.nodes.token[nodes.clamp(min=0)],
        attention_mask=(nodes >= 0).long(),
        position_ids=torch.arange(nodes.shape[1], device=nodes.device).expand(nodes.shape),
        use_cache=False,
    )
    states.append(nodes, hidden, None)


def split(stage: Stage) -> Iterator[Stage]:
    """Split the rows of a stage if no gradient holds the activations of all."""
    rows = len(stage.nodes)
    if not torch.is_grad_enabled():
        width = stage.nodes.shape[1] + stage.context.shape[1]
        rows = max(1, FORWARD_TOKENS // width)
    return map(Stage, stage.nodes.split(rows), stage.context.split(rows))


def forward_stage(
    trunk: nn.Module, tree: Nodes, stage: Stage, states: TreeStates, keep: bool
) -> None:
    """Run the rows of a stage and append their states; `keep` appends keys and values too."""
    nodes = stage.nodes.clamp(min=0)
    options: dict[str, Any] = {"use_cache": False}
    cache = None
    if keep or stage.context.shape[1] > 0:
        cache = states.cache(trunk.config, stage.context)
        options = {"use_cache": True, "past_key_values": cache}
    hidden = last_hidden_states(
        trunk,
        last=0,
        input_ids=tree.token[nodes],
        position_ids=tree.depth[nodes],
        attention_mask=attention_mask(trunk, tree, stage),
        **options,
    )
    states.append(stage.nodes, hidden, cache if keep else None)


def attention_mask(trunk: nn.Module, tree: Nodes, stage: Stage) -> Tensor | dict[str, Tensor]:
    """Return the additive mask [R, 1, T, P + T], by type of layer if windows differ."""
    queries = stage.nodes[:, :, None]
    keys = torch.cat([stage.context, stage.nodes], dim=1)[:, None]
    ancestors = (keys >= 0) & (keys <= queries) & (queries < tree.end[keys.clamp(min=0)])
    dtype = next(trunk.parameters()).dtype
    if torch.is_autocast_enabled(trunk.device.type):
        dtype = torch.get_autocast_dtype(trunk.device.type)

    def additive(seen: Tensor) -> Tensor:
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]

    types, options = get_layer_types_and_kwargs(trunk.config.get_text_config())
    windows = {kind: each.get("sliding_window") for kind, each in zip(types, options, strict=True)}
    deepest = int(tree.depth.max())
    if all(window is None or deepest < window for window in windows.values()):
        return additive(ancestors)
    at, of = (tree.depth[x.clamp(min=0)] for x in (queries, keys))

    def seen(kind: str, window: int | None) -> Tensor:
        if window is None:
            return ancestors
        near = at // window == of // window if kind == "chunked_attention" else at - of < window
        return ancestors & near

    masks = {kind: additive(seen(kind, window)) for kind, window in windows.items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))


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
