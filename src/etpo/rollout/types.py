"""Data types of rollouts and training batches: B actions, P prompt tokens, L action tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Actions(NamedTuple):
    """Actions of one policy iteration, ordered by round, then by environment.

    Prompts are left-padded, actions right-padded. An action ends with a stop token or at the length
    limit.
    """

    prompt_ids: Tensor  # int64 [B, P]
    prompt_mask: Tensor  # bool [B, P]
    action_ids: Tensor  # int64 [B, L]
    action_mask: Tensor  # bool [B, L]
    hidden_states: Tensor  # [B, L, D], policy outputs recorded during generation
    rewards: Tensor  # float32 [B]
    terminated: Tensor  # bool [B], true if the episode ended; the next value is 0
    truncated: Tensor  # bool [B], true if the episode was cut; the next value is bootstrapped
    step: Tensor  # int64 [B], index of the action in its episode, from 0


class Record(NamedTuple):
    """One action in readable form; a line of `episodes.jsonl`.

    length_limited: true if `max_new_tokens` was reached before a stop token or stop string.
    """

    env: int
    attempt: int
    prompt: str
    action: str
    reward: float
    error: str | None
    cached: bool
    length_limited: bool = False


class Rollout(NamedTuple):
    """Actions, next prompts of truncated actions, readable records and timings.

    bootstrap_ids, bootstrap_mask: [B', P'], prompts of the true next observations of the truncated
    actions, in their order.
    """

    actions: Actions
    bootstrap_ids: Tensor
    bootstrap_mask: Tensor
    records: list[Record]
    num_envs: int
    dropped_prompt_tokens: int
    generate_seconds: float
    score_seconds: float


class TokenBatch(NamedTuple):
    """Training batch of an on-policy algorithm; no tensor carries a gradient.

    `old` is the policy that sampled the actions, `ref` the frozen reference.
    """

    prompt_ids: Tensor  # int64 [B, P]
    prompt_mask: Tensor  # bool [B, P]
    action_ids: Tensor  # int64 [B, L]
    action_mask: Tensor  # bool [B, L]
    old_hidden: Tensor  # [B, L, D]
    ref_hidden: Tensor  # [B, L, D]
    old_log_probs: Tensor  # float32 [B, L], of the taken tokens
    ref_log_probs: Tensor  # float32 [B, L], of the taken tokens
    advantages: Tensor  # float32 [B, L]
    returns: Tensor  # float32 [B, L], regression targets of the critic
    weights: Tensor  # float32 [B], weight of the action in the policy objective
    critic_hidden: Tensor | None = None  # [B, L, C], of the target critic
    action_values: Tensor | None = None  # float32 [B], Q(o, a) of the target critic


def pad_stack(blocks: Sequence[Tensor], value: float, *, left: bool) -> Tensor:
    """Concatenate [b, ...] or [b, T_i, ...] to [sum b, max T, ...], padded with `value`."""
    width = max(block.shape[1] if block.ndim > 1 else 0 for block in blocks)
    padded = []
    for block in blocks:
        gap = width - block.shape[1] if block.ndim > 1 else 0
        edges = (0, 0) * (block.ndim - 2) + ((gap, 0) if left else (0, gap))
        padded.append(torch.nn.functional.pad(block, edges, value=value) if gap else block)
    return torch.cat(padded)
