"""Soft values, targets and lambda-returns of the token-level MDP (ETPO, arXiv 2402.06700).

State x is a prefix (observation and the tokens so far), action w a token of the vocabulary V. The
discount is 1 inside an action and gamma between actions; with it the token-level recursion has
exactly the action-level optimum. Every function is pure and keeps the dtype of its inputs.
"""

import torch
from torch import Tensor


def at_taken(values: Tensor, taken: Tensor) -> Tensor:
    """values(w) of the taken tokens: [..., V], int64 [...] -> [...]."""
    return values.gather(-1, taken.unsqueeze(-1)).squeeze(-1)


def expectation(log_p: Tensor, values: Tensor) -> Tensor:
    """sum_w p(w) values(w): [..., V], [..., V] -> [...].

    Tokens with p(w) = 0 (masked ids, log_p = -inf) count 0 whatever their value is, nan included.
    """
    p = log_p.exp()
    return (p * torch.where(p > 0, values, torch.zeros_like(values))).sum(-1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats, exact over the vocabulary: [..., V], [..., V] -> [...].

    p(w) = 0 counts 0; p(w) > 0 where q(w) = 0 gives +inf.
    """
    return expectation(log_p, log_p - log_q)


def entropy(log_p: Tensor) -> Tensor:
    """H(p) in nats, from 0 to log V: [..., V] -> [...]; p(w) = 0 counts 0."""
    return -expectation(log_p, log_p)


def soft_value(log_pi: Tensor, log_ref: Tensor, q: Tensor, beta: float) -> Tensor:
    """V(x) = E_pi[Q(x, .)] - beta KL(pi || pi_ref), all at the same prefix: [..., V] -> [...].

    `log_pi`, `log_ref` and `q` are [..., V]; `beta` >= 0 is the KL coefficient.
    """
    return expectation(log_pi, q) - beta * kl_divergence(log_pi, log_ref)


def one_step_targets(rewards: Tensor, discounts: Tensor, next_values: Tensor) -> Tensor:
    """The per-token soft Bellman update, the target of Q(x_k, w_k); all [..., K].

    Inside an action R_k = 0 and g_k = 1; at its last token R_k is the action's reward and
    g_k = gamma (1 - terminated). V_{k+1} is the target critic's soft value of the next prefix,
    after a truncation that of the true next observation.
    """
    # y_k = R_k + g_k V_{k+1}
    return rewards + discounts * next_values


def lambda_returns(
    rewards: Tensor,
    discounts: Tensor,
    next_values: Tensor,
    next_q_taken: Tensor,
    lambda_: float,
    continues: Tensor,
) -> Tensor:
    """Soft TD(lambda) with Q as control variate; all [N, K], a row is one sequence of tokens.

    `rewards`, `discounts` and `next_values` as in `one_step_targets`; `next_q_taken` is
    Q(x_{k+1}, w_{k+1}); `lambda_` in [0, 1]. `continues` (bool) is true where token k+1 is in the
    data and in the same episode; elsewhere (termination, truncation, end of the row) the return
    bootstraps with V_{k+1} and `next_q_taken` is not read. Padding has rewards and discounts 0.

    At lambda = 1 and on-policy unbiased for Q^pi with any critic, if V and Q come from the same one
    (both masked, or neither). Q^pi is a fixed point for every lambda and every behaviour policy,
    but far off-policy the update need not contract. lambda = 0 is the paper's one-step update. Soft
    form of Q(lambda) with off-policy corrections (Harutyunyan et al., arXiv 1602.04951).
    """
    after = torch.zeros_like(rewards[:, 0])  # G_{k+1}
    returns = torch.empty_like(rewards)
    for k in reversed(range(rewards.shape[1])):
        surprise = torch.where(continues[:, k], after - next_q_taken[:, k], 0.0)
        # G_k = R_k + g_k [ V_{k+1} + lambda ( G_{k+1} - Q_{k+1}(w_{k+1}) ) ]
        after = rewards[:, k] + discounts[:, k] * (next_values[:, k] + lambda_ * surprise)
        returns[:, k] = after
    return returns


def soft_lambda_returns(
    rewards: Tensor,
    discounts: Tensor,
    next_values: Tensor,
    next_kl: Tensor,
    lambda_: float,
    beta: float,
    continues: Tensor,
) -> Tensor:
    """Soft TD(lambda) without the control variate; arguments as in `lambda_returns`.

    `next_kl` is KL(pi || pi_ref) at x_{k+1}, exact or the sampled log-ratio. Same mean as
    `lambda_returns` on-policy; off-policy Q^pi is not its fixed point unless lambda = 0.
    """
    after = torch.zeros_like(rewards[:, 0])  # G_{k+1}
    returns = torch.empty_like(rewards)
    for k in reversed(range(rewards.shape[1])):
        value = next_values[:, k]
        mixed = (1 - lambda_) * value + lambda_ * (after - beta * next_kl[:, k])
        # G_k = R_k + g_k [ (1 - lambda) V_{k+1} + lambda ( G_{k+1} - beta KL_{k+1} ) ]
        after = rewards[:, k] + discounts[:, k] * torch.where(continues[:, k], mixed, value)
        returns[:, k] = after
    return returns
