"""Advantages of the baselines: pure functions of rewards, values and log-probabilities.

[N, K]: one row per environment, its steps (tokens or whole actions) one after the other; [B]: one
number per action. No function has a gradient to pass on.
"""

import torch
from torch import Tensor


def penalised_rewards(
    rewards: Tensor, log_pi: Tensor, log_ref: Tensor, beta: float, valid: Tensor
) -> Tensor:
    """R - beta (log pi - log pi_ref) of the taken steps, 0 where not `valid`; all [..., K].

    The KL penalty in the reward of RLHF (Ouyang et al., arXiv 2203.02155, equation 2). Its mean
    over pi is beta KL(pi || pi_ref).
    """
    return torch.where(valid, rewards - beta * (log_pi - log_ref), torch.zeros_like(rewards))


def generalized_advantages(
    rewards: Tensor,
    discounts: Tensor,
    values: Tensor,
    next_values: Tensor,
    lambda_: float,
    continues: Tensor,
) -> Tensor:
    """A_k = d_k + g_k lambda A_{k+1}, d_k = R_k + g_k V_{k+1} - V_k; all [N, K].

    `discounts` g_k are 0 where a step terminates; `next_values` V_{k+1} are those of the true next
    state, also after a truncation. `continues` (bool): step k+1 is in the data and in the same
    episode. lambda in [0, 1]. Generalized advantage estimation (arXiv 1506.02438, equation 16) with
    a discount of its own for every step.
    """
    after = torch.zeros_like(rewards[:, 0])
    advantages = torch.empty_like(rewards)
    for k in reversed(range(rewards.shape[1])):
        error = rewards[:, k] + discounts[:, k] * next_values[:, k] - values[:, k]
        after = error + discounts[:, k] * lambda_ * torch.where(continues[:, k], after, 0.0)
        advantages[:, k] = after
    return advantages


def group_mean_of_others(returns: Tensor, group: Tensor) -> Tensor:
    """Mean return of the other actions of the same group; [B], int64 [B] -> [B].

    For one alone it is its own return: there is nothing to compare it with. The leave-one-out
    baseline of RLOO (Ahmadian et al., arXiv 2402.14740).
    """
    same = (group[:, None] == group[None, :]).to(returns.dtype)
    others = same.sum(1) - 1
    mean = (same @ returns - returns) / others.clamp(min=1)
    return torch.where(others > 0, mean, returns)


def group_standardised(returns: Tensor, group: Tensor, epsilon: float = 1e-4) -> Tensor:
    """(R - mean) / (deviation + epsilon) within each group; [B], int64 [B] -> [B].

    The deviation is that of a sample (n - 1), 0 for one alone, as in GRPO (arXiv 2402.03300).
    """
    same = (group[:, None] == group[None, :]).to(returns.dtype)
    count = same.sum(1)
    mean = same @ returns / count
    square = (same * (returns[None, :] - mean[:, None]).square()).sum(1)
    return (returns - mean) / ((square / (count - 1).clamp(min=1)).sqrt() + epsilon)


def groups_of_prompts(prompt_ids: Tensor, prompt_mask: Tensor) -> Tensor:
    """A group number for every action: [B, P], bool [B, P] -> int64 [B].

    Actions on equal prompts make a group. Those whose prompt nobody shares, as repair prompts are,
    make one together.
    """
    both = torch.cat([torch.where(prompt_mask, prompt_ids, -1), prompt_mask.long()], dim=1)
    _, group, counts = torch.unique(both, dim=0, return_inverse=True, return_counts=True)
    return torch.where(counts[group] == 1, len(counts), group)


def k3(log_pi: Tensor, log_ref: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = log pi_ref - log pi of the sampled tokens: [...] -> [...].

    An unbiased, never negative estimate of KL(pi || pi_ref) for tokens that pi sampled (Schulman,
    2020), with the gradient that GRPO gives it.
    """
    difference = log_ref - log_pi
    return difference.exp() - difference - 1
