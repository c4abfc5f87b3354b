"""Soft values, returns and advantages of the token-level MDP as pure functions.

State x is a prefix (observation and previous tokens), action w a token of the vocabulary V. With
discount 1 inside an action and gamma between actions, the token-level recursion has exactly the
action-level optimum (ETPO, arXiv 2402.06700). Shapes: [..., V] over the vocabulary; [N, K] steps
(tokens or actions) in time order, one row per environment. Every function keeps
the dtype of its inputs.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def expectation(log_p: Tensor, values: Tensor) -> Tensor:
    """Compute sum_w p(w) values(w): [..., V], [..., V] -> [...].

    Tokens with p(w) = 0 (masked ids, log_p = -inf) contribute 0, even if their value is NaN.
    """
    # exp of -inf, or to a denormal number, is several times as slow
    least = math.log(torch.finfo(log_p.dtype).tiny) + 5.0
    p = log_p.clamp(min=least).exp()
    return (p * torch.where(log_p > least, values, torch.zeros_like(values))).sum(-1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Compute KL(p || q) in nats, exact over the vocabulary: [..., V], [..., V] -> [...].

    Tokens with p(w) = 0 contribute 0; p(w) > 0 and q(w) = 0 give +inf.
    """
    return expectation(log_p, log_p - log_q)


def entropy(log_p: Tensor) -> Tensor:
    """Compute H(p) in nats, from 0 to log V: [..., V] -> [...]; p(w) = 0 contributes 0."""
    return -expectation(log_p, log_p)


def soft_value(log_pi: Tensor, log_ref: Tensor, q: Tensor, beta: float) -> Tensor:
    """Compute V(x) = E_pi[Q(x, .)] - beta KL(pi || pi_ref) at the same prefix: [..., V] -> [...].

    `beta` >= 0 is the KL coefficient.
    """
    return expectation(log_pi, q) - beta * kl_divergence(log_pi, log_ref)


def lambda_returns(
    rewards: Tensor,
    discounts: Tensor,
    next_values: Tensor,
    next_q_taken: Tensor,
    trace: Tensor | float,
    continues: Tensor,
) -> Tensor:
    """Compute soft TD(lambda) targets with Q as control variate; all [N, K].

    Inside an action R_k = 0 and g_k = 1; at its last token R_k is the action's reward and
    g_k = gamma (1 - terminated). V_{k+1} is the soft value of the next prefix; at a truncation, of
    the true next observation. Padding has rewards and discounts 0.

    On-policy with lambda = 1 the return is unbiased for Q^pi with any critic, if V and Q come from
    the same critic. Q^pi is a fixed point for every lambda and every behaviour policy; with the
    truncated ratios of `traces` the update contracts for every behaviour policy. lambda = 0 is the
    paper's one-step update (equation 12). Soft form of Retrace(lambda) (arXiv 1606.02647, equation
    3), and without ratios of Q(lambda) with off-policy corrections (arXiv 1602.04951).

    Args:
        rewards, discounts, next_values: R_k, g_k and V_{k+1}.
        next_q_taken: Q(x_{k+1}, w_{k+1}); ignored if `continues` is false.
        trace: c_{k+1} in [0, 1], lambda or the output of `traces`.
        continues: bool, true if the data contain step k + 1 of the same episode; otherwise the
            return bootstraps with V_{k+1}.
    """
    c = torch.as_tensor(trace, dtype=rewards.dtype).expand_as(rewards)
    after = torch.zeros_like(rewards[:, 0])  # G_{k+1}
    returns = torch.empty_like(rewards)
    for k in reversed(range(rewards.shape[1])):
        error = torch.where(continues[:, k], after - next_q_taken[:, k], 0.0)
        # G_k = R_k + g_k [ V_{k+1} + c_{k+1} ( G_{k+1} - Q_{k+1}(w_{k+1}) ) ]
        after = rewards[:, k] + discounts[:, k] * (next_values[:, k] + c[:, k] * error)
        returns[:, k] = after
    return returns


def traces(last: Tensor, inside: Tensor | float, between: float, ratios: Tensor) -> Tensor:
    """Compute the trace from step k to k + 1, lambda min(1, pi/mu); all [N, K].

    Lambda depends on the level: `inside` from a token to the next one of its action, `between` from
    an action to the next one. Both have the same fixed point; a lambda below 1 between actions
    lowers the variance of late rewards, and one inside an action biases the credit of its early
    tokens (bi-level GAE, arXiv 2510.16907). The truncated ratio is Retrace's (arXiv 1606.02647).

    Args:
        last: bool, true at the last step of an action.
        inside, between: in [0, 1].
        ratios: pi/mu of the taken step k, where mu is the policy that sampled it.
    """
    following = F.pad(ratios[:, 1:], (0, 1), value=1.0).clamp(max=1)
    return torch.where(last, between, inside) * following


def adaptive_lambda(lengths: Tensor, alpha: float) -> Tensor:
    """Return 1 - 1 / (alpha l), at least 0, of actions with l steps; any shape, float.

    Length-adaptive lambda of the policy's advantages (VAPO, arXiv 2504.05118).
    """
    return (1 - 1 / (alpha * lengths)).clamp(min=0)


def generalized_advantages(
    rewards: Tensor,
    discounts: Tensor,
    values: Tensor,
    next_values: Tensor,
    trace: Tensor | float,
    continues: Tensor,
) -> Tensor:
    """Compute A_k = d_k + g_k c_{k+1} A_{k+1} with d_k = R_k + g_k V_{k+1} - V_k; all [N, K].

    Generalized advantage estimation (arXiv 1506.02438, equation 16) with one discount and one trace
    per step. Arguments as in `lambda_returns`. With V^pi and whole ratios pi/mu the mean of A_k
    given step k is Q^pi - V^pi for every behaviour policy mu. Truncated ratios bias it, unlike in
    `lambda_returns`: the fixed point is then V-trace's (arXiv 1802.01561, equation 4), the value of
    a policy between mu and pi.
    """
    c = torch.as_tensor(trace, dtype=rewards.dtype).expand_as(rewards)
    after = torch.zeros_like(rewards[:, 0])
    advantages = torch.empty_like(rewards)
    for k in reversed(range(rewards.shape[1])):
        error = rewards[:, k] + discounts[:, k] * next_values[:, k] - values[:, k]
        after = error + discounts[:, k] * c[:, k] * torch.where(continues[:, k], after, 0.0)
        advantages[:, k] = after
    return advantages


def discounted_returns(rewards: Tensor, discounts: Tensor, continues: Tensor) -> Tensor:
    """Compute G_k = R_k + g_k G_{k+1}, 0 after the end of an episode; all [N, K]."""
    after = torch.zeros_like(rewards[:, 0])
    returns = torch.empty_like(rewards)
    for k in reversed(range(rewards.shape[1])):
        after = rewards[:, k] + discounts[:, k] * torch.where(continues[:, k], after, 0.0)
        returns[:, k] = after
    return returns


def kl_penalized_rewards(
    rewards: Tensor, log_pi: Tensor, log_ref: Tensor, beta: float, valid: Tensor
) -> Tensor:
    """Compute R - beta (log pi - log pi_ref) of the taken steps, 0 if not `valid`; all [..., K].

    KL penalty in the reward (Ouyang et al., arXiv 2203.02155, equation 2), with mean
    beta KL(pi || pi_ref) under pi.
    """
    return torch.where(valid, rewards - beta * (log_pi - log_ref), torch.zeros_like(rewards))


def explained_variance(predictions: Tensor, targets: Tensor) -> float:
    """1 - Var(targets - predictions) / Var(targets), at most 1; [K], [K]; 0 for equal targets."""
    variance = targets.var()
    return float(1 - (targets - predictions).var() / variance) if variance > 0 else 0.0
