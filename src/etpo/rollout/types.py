"""Typed records of what a rollout produced; B actions, prompts of P and actions of L tokens."""

from typing import NamedTuple

import torch
from torch import Tensor


class Actions(NamedTuple):
    """One policy iteration's actions, ordered by round, then by environment.

    Prompts are padded on the left, actions on the right; an action ends with its stop token or at
    the length limit.
    """

    prompt_ids: Tensor  # int64 [B, P]
    prompt_mask: Tensor  # bool [B, P]
    action_ids: Tensor  # int64 [B, L]
    action_mask: Tensor  # bool [B, L]
    log_probs: Tensor  # float32 [B, L], of the taken tokens, recorded while sampling
    features: Tensor  # [B, L, D], the policy's last hidden states, recorded while sampling
    rewards: Tensor  # float32 [B]
    terminated: Tensor  # bool [B], the episode ended here and its value is 0
    truncated: Tensor  # bool [B], the episode was cut here and its value is bootstrapped
    step: Tensor  # int64 [B], t: number of the action in its episode, from 0


class Record(NamedTuple):
    """One action as a person reads it; a line of `episodes.jsonl`.

    length_limited: it was cut at `max_new_tokens`, before a stop token or a stop string.
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
    """Actions, the next prompts of the truncated ones, their records, and how long it took.

    bootstrap_ids, bootstrap_mask: [B', P'] prompts of the true next observations, one for every
    truncated action, in order.
    """

    actions: Actions
    bootstrap_ids: Tensor
    bootstrap_mask: Tensor
    records: list[Record]
    num_envs: int
    dropped_prompt_tokens: int
    generate_seconds: float
    score_seconds: float


def pad_stack(rows: list[Tensor], value: float, *, left: bool) -> Tensor:
    """Concatenates [b, T_i, ...] to [sum b, max T, ...], padded with `value` on one side."""
    width = max(block.shape[1] for block in rows)
    padded = []
    for block in rows:
        gap = width - block.shape[1]
        edges = (0, 0) * (block.ndim - 2) + ((gap, 0) if left else (0, gap))
        padded.append(torch.nn.functional.pad(block, edges, value=value))
    return torch.cat(padded)


class EpisodeLayout(NamedTuple):
    """Where the tokens of each environment's episodes lie, one after the other.

    positions: int64 [N, K] into the flattened [B * L] tokens, valid tokens first, in time order.
    valid: bool [N, K].
    """

    positions: Tensor
    valid: Tensor


def episode_layout(action_mask: Tensor, num_envs: int) -> EpisodeLayout:
    """Layout of [B, L] tokens whose rows are ordered by round, then by environment."""
    batch, length = action_mask.shape
    by_env = (batch // num_envs, num_envs, length)
    position = torch.arange(batch * length, device=action_mask.device).view(by_env)
    position = position.transpose(0, 1).reshape(num_envs, -1)
    valid = action_mask.reshape(-1)[position]
    order = torch.argsort(~valid, dim=1, stable=True)
    width = int(valid.sum(1).max())
    return EpisodeLayout(position.gather(1, order)[:, :width], valid.gather(1, order)[:, :width])


def pack(values: Tensor, layout: EpisodeLayout) -> Tensor:
    """[B, L] -> [N, K]; padding becomes 0."""
    packed = values.reshape(-1)[layout.positions]
    return torch.where(layout.valid, packed, torch.zeros_like(packed))


def unpack(packed: Tensor, layout: EpisodeLayout, like: Tensor) -> Tensor:
    """[N, K] -> [B, L] in the shape of `like`; padding becomes 0."""
    flat = torch.zeros(like.numel(), dtype=packed.dtype, device=packed.device)
    flat[layout.positions[layout.valid]] = packed[layout.valid]
    return flat.view(like.shape)


class Steps(NamedTuple):
    """The steps of every environment in a row each, [N, K]: tokens, or whole actions.

    rewards: an action's reward at its last token, 0 elsewhere. discounts: of what follows a step;
    0 after a termination. ends: the episode ends or is cut here. continues: bool, the next step
    belongs to the same episode.
    """

    layout: EpisodeLayout
    rewards: Tensor
    discounts: Tensor
    ends: Tensor
    continues: Tensor


def episode_steps(
    actions: Actions, mask: Tensor, num_envs: int, gamma: float, token_discount: float = 1.0
) -> Steps:
    """The steps that `mask` [B, L] marks; a mask [B, 1] of ones makes every action one step.

    `gamma` discounts between actions, `token_discount` inside one.
    """
    last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    rewards = torch.where(last, actions.rewards[:, None], 0.0)
    between = gamma * (~actions.terminated).to(rewards.dtype)
    discounts = torch.where(last, between[:, None], token_discount)
    layout = episode_layout(mask, num_envs)
    ends = pack(last & (actions.terminated | actions.truncated)[:, None], layout)
    return Steps(layout, pack(rewards, layout), pack(discounts, layout), ends, layout.valid & ~ends)


def following_values(steps: Steps, values: Tensor, bootstrap: Tensor) -> Tensor:
    """V of the prefix after every step: [B, L], [B] -> [N, K].

    Where an episode ends or is cut it is `bootstrap`, the value of the action's true next prompt
    (0 after a termination).
    """
    at_end = pack(bootstrap[:, None].expand_as(values), steps.layout)
    following = torch.nn.functional.pad(pack(values, steps.layout)[:, 1:], (0, 1))
    return torch.where(steps.ends, at_end, following)
