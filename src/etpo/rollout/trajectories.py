"""Conversion between a batch of actions [B, L] and one trajectory per environment [N, K]."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from etpo.rollout.types import Actions


class TrajectoryLayout(NamedTuple):
    """Positions of each environment's steps in the flattened [B * L] tokens.

    positions: int64 [N, K], valid steps first, in time order. rows: int64 [N, K], index of the
    action of each step. valid: bool [N, K].
    """

    positions: Tensor
    rows: Tensor
    valid: Tensor


class Steps(NamedTuple):
    """Trajectories of steps, [N, K] each; a step is a token or a whole action.

    rewards: reward of the action at its last token, 0 elsewhere. discounts: factor of the next
    value, 0 after a termination. last: true at the last step of an action. ends: true at a
    termination or truncation. continues: true if the next step belongs to the same episode.
    """

    layout: TrajectoryLayout
    rewards: Tensor
    discounts: Tensor
    last: Tensor
    ends: Tensor
    continues: Tensor


def trajectory_layout(mask: Tensor, num_envs: int) -> TrajectoryLayout:
    """Return the layout of [B, L] steps whose rows are ordered by round, then by environment."""
    batch, length = mask.shape
    position = torch.arange(batch * length, device=mask.device)
    position = position.view(batch // num_envs, num_envs, length).transpose(0, 1)
    position = position.reshape(num_envs, -1)
    valid = mask.reshape(-1)[position]
    order = torch.argsort(~valid, dim=1, stable=True)[:, : int(valid.sum(1).max())]
    position = position.gather(1, order)
    return TrajectoryLayout(position, position // length, valid.gather(1, order))


def to_trajectories(values: Tensor, layout: TrajectoryLayout) -> Tensor:
    """Gather [B, L] -> [N, K]; padding becomes 0."""
    packed = values.reshape(-1)[layout.positions]
    return torch.where(layout.valid, packed, torch.zeros_like(packed))


def from_trajectories(packed: Tensor, layout: TrajectoryLayout, like: Tensor) -> Tensor:
    """Scatter [N, K] -> [B, L], the shape of `like`; padding becomes 0."""
    flat = torch.zeros(like.numel(), dtype=packed.dtype, device=packed.device)
    flat[layout.positions[layout.valid]] = packed[layout.valid]
    return flat.view(like.shape)


def trajectory_steps(
    actions: Actions, mask: Tensor, num_envs: int, gamma: float, token_discount: float = 1.0
) -> Steps:
    """Build the steps marked by `mask` [B, L]; with a mask [B, 1] each action is one step.

    The last step of an action carries its reward.

    Args:
        gamma: discount between actions, in [0, 1].
        token_discount: discount between the tokens of an action, in [0, 1].
    """
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    rewards = torch.where(last, actions.rewards[:, None], 0.0)
    between = gamma * (~actions.terminated).to(rewards.dtype)
    discounts = torch.where(last, between[:, None], token_discount)
    layout = trajectory_layout(mask, num_envs)
    ends = to_trajectories(last & (actions.terminated | actions.truncated)[:, None], layout)
    rewards, discounts, last = (to_trajectories(x, layout) for x in (rewards, discounts, last))
    return Steps(layout, rewards, discounts, last, ends, layout.valid & ~ends)


def shifted(values: Tensor) -> Tensor:
    """Shift values to the previous step, with 0 at the end: [N, K] -> [N, K]."""
    return pad(values[:, 1:], (0, 1))


def next_values(steps: Steps, values: Tensor, bootstrap: Tensor) -> Tensor:
    """Return the value after each step: values [N, K] of the steps, bootstrap [B] -> [N, K].

    At the end of an episode this is `bootstrap`: 0 after a termination, the value of the true next
    prompt after a truncation.
    """
    return torch.where(steps.ends, bootstrap[steps.layout.rows], shifted(values))
