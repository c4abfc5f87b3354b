"""Soft TD(lambda) without the control variate, which the oracle compares with `lambda_returns`."""

import torch


def kl_lambda_returns(rewards, discounts, next_values, next_kl, lambda_, beta, continues):
    """G_k = R_k + g_k [(1 - lambda) V_{k+1} + lambda (G_{k+1} - beta KL_{k+1})]; all [N, K].

    Arguments as in `lambda_returns`; next_kl is KL(pi || pi_ref) at x_{k+1}.
    """
    after = torch.zeros_like(rewards[:, 0])
    returns = torch.empty_like(rewards)
    for k in reversed(range(rewards.shape[1])):
        value = next_values[:, k]
        mixed = (1 - lambda_) * value + lambda_ * (after - beta * next_kl[:, k])
        after = rewards[:, k] + discounts[:, k] * torch.where(continues[:, k], mixed, value)
        returns[:, k] = after
    return returns
