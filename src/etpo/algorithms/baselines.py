"""Baselines of returns from other environments and episodes, as pure functions.

Shapes: [N, K] steps (tokens or actions) in time order, one row per environment; [B] one number per
action. Every function keeps the dtype of its inputs.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def leave_one_out_baseline(errors: Tensor, valid: Tensor, group: Tensor) -> Tensor:
    """Average the errors over the valid steps of the OTHER rows of a row's group.

    [N, K], bool [N, K], int64 [N] -> [N]; 0 if no other row has a valid step. Rows are independent
    (one environment each), so the baseline of row n does not depend on its actions. Subtracting it
    from the errors G - Q shifts Q(x, .) by a constant and keeps the doubly robust gradient
    unbiased. REINFORCE leave-one-out (Kool et al., 2019), applied to the critic's errors. Groups
    are the folds of a cross-fitted critic: the errors of the other fold come from the head that was
    trained on the row itself.
    """
    errors = torch.where(valid, errors, torch.zeros_like(errors)).sum(1)
    others = (group[:, None] == group).to(errors.dtype).fill_diagonal_(0)
    return others @ errors / (others @ valid.sum(1).to(errors.dtype)).clamp(min=1)


class Groups(NamedTuple):
    """Groups of the B actions of an iteration; int64 [B] each.

    prompt: equal for equal prompts. episode: row of the first action of the episode. environment:
    in which the episodes follow one another. step: index of the action in its episode, from 0.
    """

    prompt: Tensor
    episode: Tensor
    environment: Tensor
    step: Tensor

    def select(self, rows: Tensor) -> "Groups":
        """Return the groups of the actions `rows` [b]."""
        return Groups(*(x[rows] for x in self))


def mean_of_other_episodes(returns: Tensor, groups: Groups, *keys: Tensor) -> Tensor:
    """Average the returns over actions of other episodes with the same key: [B] -> [B].

    Of several `keys`, int64 [B], the first that such an action shares counts; 0 without one. Other
    episodes are those of other environments and earlier ones of the same environment. Later ones of
    the same environment are left out: the action decides when they begin and where the last round
    cuts them. So the baseline does not depend on the action, and subtracting it keeps the policy
    gradient unbiased.
    """
    episode, environment = groups.episode, groups.environment
    other = environment[:, None] != environment[None, :]
    other = other | (episode[:, None] > episode[None, :])
    baseline = torch.zeros_like(returns)
    for key in reversed(keys):
        same = (other & (key[:, None] == key[None, :])).to(returns.dtype)
        count = same.sum(1)
        baseline = torch.where(count > 0, same @ returns / count.clamp(min=1), baseline)
    return baseline


def group_standardized(returns: Tensor, group: Tensor, epsilon: float = 1e-4) -> Tensor:
    """Return (R - mean) / (deviation + epsilon) within each group; [B], int64 [B] -> [B].

    Sample deviation (n - 1), 0 for a group of one, as in GRPO (arXiv 2402.03300).
    """
    same = (group[:, None] == group[None, :]).to(returns.dtype)
    count = same.sum(1)
    mean = same @ returns / count
    square = (same * (returns[None, :] - mean[:, None]).square()).sum(1)
    return (returns - mean) / ((square / (count - 1).clamp(min=1)).sqrt() + epsilon)


def prompt_groups(prompt_ids: Tensor, prompt_mask: Tensor) -> Tensor:
    """Number the distinct prompts: [B, P], bool [B, P] -> int64 [B]."""
    both = torch.cat([torch.where(prompt_mask, prompt_ids, -1), prompt_mask.long()], dim=1)
    _, group = torch.unique(both, dim=0, return_inverse=True)
    return torch.as_tensor(group)


def unique_as_one_group(group: Tensor) -> Tensor:
    """Join the groups of one to a single group; int64 [B] -> int64 [B]."""
    counts = torch.bincount(group)
    return torch.where(counts[group] == 1, len(counts), group)


def action_groups(prompt_ids: Tensor, prompt_mask: Tensor, step: Tensor, num_envs: int) -> Groups:
    """Build the groups of an iteration; [B, P], bool [B, P], int64 [B].

    Rows are ordered by round, then by environment. Every environment begins with an episode, whose
    first action has `step` 0.
    """
    rows = torch.arange(len(step), device=step.device)
    started = torch.where(step == 0, rows, 0).view(-1, num_envs)
    episode = started.cummax(0).values.flatten()
    return Groups(prompt_groups(prompt_ids, prompt_mask), episode, rows % num_envs, step)


def state_baseline(
    errors: Tensor, valid: Tensor, prompts: Tensor, prefixes: Tensor, group: Tensor
) -> Tensor:
    """Average the errors of OTHER rows at the same prefix, shrunk to wider averages.

    All [N, K], but group [N], as in `leave_one_out_baseline`. From that average over all steps to
    the average at the same prompt, and from it to the average at the same prefix:

        b = (sum of n errors of other rows + b of the wider set) / (n + 1)

    A baseline that depends on the state and on other environments' actions keeps the doubly robust
    gradient unbiased, and removes the critic's error that all actions at a state share.

    prompts, prefixes: int64 keys of the step's prompt and of its prefix, `prefix_keys`.
    """
    baseline = leave_one_out_baseline(errors, valid, group)[:, None].expand_as(errors)
    errors = torch.where(valid, errors, torch.zeros_like(errors))
    for keys in (prompts, prefixes):
        # a pair of key and group: rows of other groups are not averaged
        pairs = torch.stack([keys, group[:, None].expand_as(keys)], -1).view(-1, 2)
        numbers, at = torch.unique(pairs, dim=0, return_inverse=True)
        at, own = at.view(keys.shape), errors.new_zeros(2, len(keys), len(numbers))
        own[0].scatter_add_(1, at, errors)
        own[1].scatter_add_(1, at, valid.to(errors.dtype))
        total, count = (own.sum(1, keepdim=True) - own).gather(2, at.expand(2, -1, -1))
        baseline = (total + baseline) / (count + 1)
    return baseline


def prefix_keys(prompt_ids: Tensor, prompt_mask: Tensor, action_ids: Tensor) -> Tensor:
    """Return a key of the prefix before each token of action_ids [B, L]: int64 [B, L].

    Equal prefixes have equal keys, also on other processes; different ones differ but for a chance
    of about 2^-64 per pair. prompt_ids: [B, P], prompt_mask: bool [B, P].
    """
    key, keys = prompt_ids.new_zeros(len(prompt_ids)), []

    def extended(key: Tensor, ids: Tensor) -> Tensor:
        """Append a token to the prefixes; a product wraps around."""
        mixed = (key + ids + 1) * 6364136223846793005 + 1442695040888963407
        return mixed ^ (mixed >> 29)

    for ids, seen in zip(prompt_ids.unbind(1), prompt_mask.unbind(1), strict=True):
        key = torch.where(seen, extended(key, ids), key)
    for ids in action_ids.unbind(1):
        keys.append(key)
        key = extended(key, ids)
    return torch.stack(keys, 1)
