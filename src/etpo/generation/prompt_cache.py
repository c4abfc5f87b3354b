"""Keys and values of prompts, kept for the next turn: each distinct token is computed once."""

import functools

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from etpo.models.prefix_tree import PACKED_TOKENS, Nodes, nodes_of, stages_of, to_tensor
from etpo.models.shared_prompt import Prefill
from etpo.models.tree_forward import TreeStates, forward_stage, split


class PromptCache:
    """States of the tokens of the last prompts, as long as the weights do not change.

    A prompt that continues one of them, as in a conversation, computes its new tokens only. Needs a
    model whose tokens can be packed (`LanguageModelPolicy.packs_prefixes`).
    """

    def __init__(self) -> None:
        self.children: dict[tuple[int, int], int] = {}  # (node or -1, token) -> node
        self.hidden: Tensor  # [M, D]
        self.layers: list[tuple[Tensor, Tensor]] = []  # keys and values [M, H, D]

    @torch.no_grad()
    def prefill(self, trunk: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor) -> Prefill:
        """Compute the new tokens of prompts [B, P], padded on the left; forget all others."""
        device = prompt_ids.device
        both = torch.cat([prompt_ids, prompt_mask.long()], dim=1)
        distinct, prompt_index = torch.unique(both, dim=0, return_inverse=True)
        ids, mask = (x.cpu().numpy() for x in distinct.chunk(2, dim=1))
        mask, sizes = mask.astype(bool), mask.sum(1)
        rows = np.full(ids.shape, -1)
        rows[np.arange(ids.shape[1]) < sizes[:, None]] = ids[mask]
        at, token, depth, end = nodes_of(rows, sizes)
        before = self._former(at, token, depth)
        tensor = functools.partial(to_tensor, device=device)
        stages = stages_of(at, depth, end, PACKED_TOKENS, tensor, before >= 0)
        nodes = Nodes(*map(tensor, (token, depth, end)), stages)
        states = TreeStates(len(token), device)
        if self.layers:
            states.count, states.hidden = len(self.hidden), [self.hidden]
            states.place = tensor(before).clamp(min=0)
            states.layers = [([keys], [values]) for keys, values in self.layers]
        for stage in stages:
            for part in split(stage):
                forward_stage(trunk, nodes, part, states, keep=True)
        self.hidden = torch.cat(states.hidden)[states.place]
        self.layers = [
            (torch.cat(keys)[states.place], torch.cat(values)[states.place])
            for keys, values in states.layers
        ]
        left = np.full(ids.shape, 0)
        left[mask] = at[at >= 0]
        cache = DynamicCache(config=trunk.config)
        paths = tensor(left)
        for layer, pair in zip(cache.layers, self.layers, strict=True):
            layer.keys, layer.values = (x[paths].transpose(1, 2) for x in pair)
        last = tensor(at[np.arange(len(at)), sizes - 1])
        return Prefill(self.hidden[last, None], cache, tensor(mask).bool(), prompt_index)

    def _former(self, at: np.ndarray, token: np.ndarray, depth: np.ndarray) -> np.ndarray:
        """Return the former number of each node, -1 if it is new, and number the nodes anew."""
        row = np.unique(at, return_index=True)[1][-len(token) :] // at.shape[1]
        parents = np.where(depth > 0, at[row, np.maximum(depth - 1, 0)], -1).tolist()
        former, children = np.full(len(token) + 1, -1), {}  # the last entry stands for no parent
        for node, (parent, each) in enumerate(zip(parents, token.tolist(), strict=True)):
            children[parent, each] = node
            if parent < 0 or former[parent] >= 0:
                former[node] = self.children.get((int(former[parent]), each), -1)
        self.children = children
        return former[:-1]
