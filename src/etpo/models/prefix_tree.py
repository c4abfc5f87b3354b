"""Tree of the distinct prefixes of a batch of actions, and the packed forwards that compute it.

A prefix is a prompt with the first l tokens of an action. Rows that share a prompt, turns of one
conversation and actions that begin alike share prefixes: each distinct token is one node and is
computed once. Nodes are numbered in depth-first order, so that the descendants of a node are a
range of numbers, and a token attends to the nodes whose range contains it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

PACKED_TOKENS = 128  # limit of a packed row; T tokens in one row cost T^2 in attention


class Stage(NamedTuple):
    """Packed rows of one forward, after the forwards of earlier stages; -1 is padding.

    nodes: int64 [R, T]. context: int64 [R, P], nodes of earlier stages that precede a row's.
    """

    nodes: Tensor
    context: Tensor


class Nodes(NamedTuple):
    """M distinct tokens of some rows, in depth-first order, and the stages that compute them."""

    token: Tensor  # int64 [M], ids
    depth: Tensor  # int64 [M], positions
    end: Tensor  # int64 [M], nodes of [node, end) are the node and its descendants
    stages: tuple[Stage, ...]


class PrefixTree(NamedTuple):
    """Distinct prefixes of the steps of B actions of at most L tokens: N prefixes on M nodes.

    Values of prefixes are [N, ...], values of taken tokens [N, C] (C: the largest number of
    different tokens that follow one prefix). `of_tokens` and `of_taken` map them to [B, L].
    """

    nodes: Nodes
    paths: Tensor  # int64 [R, W], nodes from a root to each leaf, padded with -1
    node: Tensor  # int64 [N], last node of each prefix
    first: Tensor  # int64 [N], place in [B * L] of a token that follows the prefix
    taken: Tensor  # int64 [N, C], ids of the tokens that follow; some are repeated as padding
    prefix: Tensor  # int64 [B, L], the prefix before each step; 0 elsewhere
    child: Tensor  # int64 [B, L], place in [N * C] of each step's token; 0 elsewhere
    mask: Tensor  # bool [B, L], steps: tokens that were drawn
    fold: Tensor  # int64 [N], of the actions; a prefix of both folds is two

    def of_tokens(self, values: Tensor) -> Tensor:
        """Return the values [N, ...] of the steps' prefixes: [B, L, ...], 0 elsewhere."""
        found = values[self.prefix]
        mask = self.mask.view(self.mask.shape + (1,) * (found.ndim - 2))
        return torch.where(mask, found, torch.zeros_like(found))

    def of_taken(self, values: Tensor) -> Tensor:
        """Return the values [N, C] of the taken tokens: [B, L], 0 where there is no step."""
        found = values.flatten()[self.child]
        return torch.where(self.mask, found, torch.zeros_like(found))

    def of_first(self, values: Tensor) -> Tensor:
        """Return the values [N] at the first step of each action: [B]."""
        return values[self.prefix.gather(1, first_step(self.mask))[:, 0]]

    def sum_to_prefixes(self, values: Tensor) -> Tensor:
        """Sum values [B, L] of tokens by their prefix: [N]."""
        return self._sums(self.prefix, values, len(self.node))

    def sum_to_taken(self, values: Tensor) -> Tensor:
        """Sum values [B, L] of tokens by prefix and taken token: [N, C]."""
        return self._sums(self.child, values, self.taken.numel()).view(self.taken.shape)

    def _sums(self, index: Tensor, values: Tensor, size: int) -> Tensor:
        sums = values.new_zeros(size)
        return sums.index_add(0, index[self.mask], values[self.mask])


def first_step(step_mask: Tensor) -> Tensor:
    """Return the place of the first step of each action: bool [B, L] -> int64 [B, 1]."""
    return step_mask.int().argmax(1, keepdim=True)


def prefix_tree(
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    action_ids: Tensor,
    step_mask: Tensor,
    fold: Tensor | None = None,
    *,
    limit: int = PACKED_TOKENS,
) -> PrefixTree:
    """Build the tree of the prefixes before the steps of action_ids [B, L].

    Args:
        prompt_ids, prompt_mask: [B, P], padded on the left.
        action_ids: [B, L], padded on the right.
        step_mask: bool [B, L], tokens before which a prefix ends; at least one per action.
        fold: int64 [B], 0 or 1. Prefixes of different folds are different, on the same nodes.
            None: all 0.
        limit: number of tokens of a packed row.
    """
    prompt, seen, ids, mask = (
        x.cpu().numpy() for x in (prompt_ids, prompt_mask, action_ids, step_mask)
    )
    prompts = seen.sum(1)
    sizes = prompts + mask.shape[1] - 1 - mask[:, ::-1].argmax(1)  # the last step is not read
    column = np.arange(sizes.max())
    joined = np.concatenate([prompt, ids], axis=1)
    place = np.minimum(column + (prompt.shape[1] - prompts)[:, None], joined.shape[1] - 1)
    rows = np.where(column < sizes[:, None], np.take_along_axis(joined, place, axis=1), -1)
    at, token, depth, end = nodes_of(rows, sizes)
    before = (prompts - 1)[:, None] + np.arange(ids.shape[1])
    last = np.take_along_axis(at, np.where(mask, before, 0), axis=1)
    half = np.zeros(len(ids), dtype=np.int64) if fold is None else fold.cpu().numpy()
    both = 2 * last + half[:, None]
    number, first, prefix = np.unique(both[mask], return_index=True, return_inverse=True)
    node = number // 2
    pairs, pair = np.unique(np.stack([prefix, ids[mask]], 1), axis=0, return_inverse=True)
    begin = np.searchsorted(pairs[:, 0], np.arange(len(node)))
    rank = np.arange(len(pairs)) - begin[pairs[:, 0]]
    taken = np.repeat(pairs[begin, 1:], rank.max() + 1, axis=1)
    taken[pairs[:, 0], rank] = pairs[:, 1]
    by_token = np.zeros((2, *ids.shape), dtype=np.int64)
    by_token[:, mask] = prefix, (pairs[:, 0] * taken.shape[1] + rank)[pair.reshape(-1)]

    tensor = functools.partial(to_tensor, device=action_ids.device)
    return PrefixTree(
        Nodes(*map(tensor, (token, depth, end)), stages_of(at, depth, end, limit, tensor)),
        paths=tensor(leaf_paths(at, end)),
        node=tensor(node),
        first=tensor(np.flatnonzero(mask)[first]),
        taken=tensor(taken),
        prefix=tensor(by_token[0]),
        child=tensor(by_token[1]),
        mask=step_mask,
        fold=tensor(number % 2),
    )


def to_tensor(x: np.ndarray, device: torch.device) -> Tensor:
    """Return an array of integers on a device."""
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64)).to(device)


def stages_of(
    at: np.ndarray,
    depth: np.ndarray,
    end: np.ndarray,
    limit: int,
    tensor: Callable[[np.ndarray], Tensor],
    known: np.ndarray | None = None,
) -> tuple[Stage, ...]:
    """Return the output of `plan` as tensors."""
    known = np.zeros(len(depth), dtype=bool) if known is None else known
    return tuple(Stage(*map(tensor, stage)) for stage in plan(at, depth, end, limit, known))


def nodes_of(
    rows: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Number the distinct prefixes of token rows [B, W], padded with -1 after `sizes` [B] tokens.

    Returns:
        Node of each token [B, W] (-1 on padding); token, depth and end of each node [M].
    """
    column = np.arange(rows.shape[1])
    keys = [row.tobytes() for row in rows.astype(">i8")]
    order = np.array(sorted(range(len(rows)), key=keys.__getitem__))
    rows, sizes = rows[order], sizes[order]
    # tokens that a row shares with the row before it
    equal = np.cumprod(rows[1:] == rows[:-1], axis=1).sum(1)
    shared = np.concatenate([[0], np.minimum(equal, sizes[1:])])
    new = (column >= shared[:, None]) & (column < sizes[:, None])
    index = np.arange(len(rows))[:, None]
    source = np.maximum.accumulate(np.where(new, index, 0), axis=0)
    numbers = (np.cumsum(new) - 1).reshape(new.shape)
    at = np.where(column < sizes[:, None], np.take_along_axis(numbers, source, axis=0), -1)
    # a node ends where the next row leaves it
    leaves = np.where(shared[:, None] <= column, index, len(rows))
    leaves = np.minimum.accumulate(leaves[::-1], axis=0)[::-1]
    leaves = np.concatenate([leaves[1:], np.full_like(leaves[:1], len(rows))])
    starts = np.concatenate([[0], np.cumsum(new.sum(1))])
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return at[back], rows[new], np.broadcast_to(column, new.shape)[new], starts[leaves][new]


def leaf_paths(at: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Return the nodes from a root to each leaf: [R, W], padded with -1."""
    last, row = np.unique(at.max(1), return_index=True)
    return at[row[end[last] == last + 1]]


def plan(
    at: np.ndarray, depth: np.ndarray, end: np.ndarray, limit: int, known: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the stages that compute every node once, except for `known` ones, bool [M].

    Nodes with more than `limit` descendants are computed first, one row for each path without a
    branch. The subtrees below them are packed into rows of at most `limit` tokens in one last
    stage. A row's context is the path to the deepest node that its subtrees follow.
    """
    unknown = np.concatenate([[0], np.cumsum(~known)])
    size = unknown[end] - unknown[:-1]  # descendants to compute, and the node
    row = np.unique(at, return_index=True)[1][-len(end) :] // at.shape[1]  # one that has the node
    parent = np.where(depth > 0, at[row, np.maximum(depth - 1, 0)], -1)

    def path(node: int) -> np.ndarray:
        return at[row[node], : depth[node] + 1] if node >= 0 else at[0, :0]

    upper = ~known & (size > limit)
    stages: list[list[tuple[list[np.ndarray], int]]] = []  # rows: parts, last node of the context
    level = dict.fromkeys([-1, *np.flatnonzero(known).tolist()], -1)
    branches = np.bincount(parent[upper & (parent >= 0)], minlength=len(end))
    chain: list[int] = []
    for node in [*np.flatnonzero(upper), None]:
        if chain and (node is None or parent[node] != chain[-1] or branches[chain[-1]] > 1):
            before = int(parent[chain[0]])
            number = level[before] + 1
            level.update(dict.fromkeys(chain, number))
            stages += [[] for _ in range(number + 1 - len(stages))]
            stages[number].append(([np.array(chain)], before))
            chain = []
        if node is not None:
            chain.append(int(node))
    computed = known | upper
    below = np.flatnonzero(~computed & ((parent < 0) | computed[parent]))
    stages.append(pack(below, size, parent, depth, end, limit))
    return [
        (padded([np.concatenate(parts) for parts, _ in rows]), padded([path(n) for _, n in rows]))
        for rows in stages
        if rows
    ]


def pack(
    roots: np.ndarray,
    size: np.ndarray,
    parent: np.ndarray,
    depth: np.ndarray,
    end: np.ndarray,
    limit: int,
) -> list[tuple[list[np.ndarray], int]]:
    """Pack subtrees into rows of at most `limit` tokens, first fit, the deepest and largest first.

    A subtree fits to a row if it follows a node on the path of the row's context.
    """
    rows: list[tuple[list[np.ndarray], int]] = []
    free: list[int] = []
    above = np.where(parent[roots] < 0, -1, depth[parent[roots]])
    for root in roots[np.lexsort((roots, -size[roots], -above))]:
        before, length = int(parent[root]), int(size[root])
        fits = (
            row
            for row, (_, last) in enumerate(rows)
            if free[row] >= length and (before < 0 or before <= last < end[before])
        )
        row = next(fits, len(rows))
        if row == len(rows):
            rows.append(([], before))
            free.append(limit)
        rows[row][0].append(np.arange(root, end[root]))
        free[row] -= length
    return rows


def padded(rows: list[np.ndarray]) -> np.ndarray:
    """Pad rows of nodes on the right with -1: [R, longest]."""
    table = np.full((len(rows), max(map(len, rows))), -1)
    for row, nodes in zip(table, rows, strict=True):
        row[: len(nodes)] = nodes
    return table
