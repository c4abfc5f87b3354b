"""Policy and critic losses of token-level RL, per prefix; the caller masks, weights and reduces.

The gradient of the policy losses is that of the regularized return J only if the losses are SUMMED
over the tokens that pi visits, each action t weighted by gamma^t (`action_weights`). Averaging over
an action's length or leaving out gamma^t changes the direction. Every function is pure and keeps
the dtype of its inputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from etpo.algorithms.returns import at_taken, expectation


def policy_objective(
    log_pi: Tensor,
    log_ref: Tensor,
    log_old: Tensor | None,
    q: Tensor,
    beta: float,
    eta: float = 0.0,
) -> Tensor:
    """L(x) = sum_w pi(w) [beta log(pi/pi_ref) + eta log(pi/pi_old) - Q(x, w)]: [..., V] -> [...].

    Exact over the vocabulary: no sampling, no importance ratio. Only `log_pi`, which must be
    normalised, gets a gradient: E_pi[f grad log pi], f the bracket, held constant because
    E_pi[grad f] = 0; so it is exactly 0, not rounding noise, at Q = 0 and pi = pi_ref.
    eta = 0 is the paper's objective (-V(x) in value) and `log_old` may be None; eta > 0 adds the
    proximal term eta KL(pi || pi_old). The optimum for a given Q is
    pi_ref^{beta/(beta+eta)} pi_old^{eta/(beta+eta)} exp(Q/(beta+eta)) / Z. ETPO, arXiv 2402.06700.
    Raises ValueError where eta > 0 lacks `log_old`.
    """
    # f(w) = beta log(pi/pi_ref) + eta log(pi/pi_old) - Q(x, w)
    cost = beta * (log_pi - log_ref) - q
    if eta > 0:
        if log_old is None:
            raise ValueError("eta > 0 needs log_old")
        cost = cost + eta * (log_pi - log_old)
    return expectation(log_pi, cost.detach())


def taken_token_correction(
    log_pi_taken: Tensor,
    log_old_taken: Tensor,
    advantage: Tensor,
    clip_low: float | None,
    clip_high: float | None,
) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A) of the sampled token: all [...] -> [...].

    ratio = pi/pi_old at the token that was taken, A = G - Q(x, w_taken) the critic's error there.
    None leaves that side alone: `clip_low` limits how far a bad token falls, `clip_high` how far a
    good one rises. Only `log_pi_taken` gets a gradient. With equal limits it is the surrogate of
    PPO, arXiv 1707.06347, equation 7.
    """
    advantage = advantage.detach()
    ratio = (log_pi_taken - log_old_taken.detach()).exp()
    low = 0.0 if clip_low is None else 1 - clip_low
    high = None if clip_high is None else 1 + clip_high
    return -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)


def clipped(
    log_pi_taken: Tensor, log_old_taken: Tensor, clip_low: float | None, clip_high: float | None
) -> Tensor:
    """Whether pi/pi_old is below 1 - `clip_low` or above 1 + `clip_high`: [...] -> bool [...].

    None: no limit on that side. Without gradient.
    """
    ratio = (log_pi_taken.detach() - log_old_taken.detach()).exp()
    low = 0.0 if clip_low is None else 1 - clip_low
    high = float("inf") if clip_high is None else 1 + clip_high
    return (ratio < low) | (ratio > high)


def doubly_robust_objective(
    log_pi: Tensor,
    log_ref: Tensor,
    log_old: Tensor,
    q: Tensor,
    taken: Tensor,
    advantages: Tensor,
    beta: float,
    eta: float = 0.0,
    clip_low: float | None = None,
    clip_high: float | None = None,
) -> Tensor:
    """`policy_objective` plus the sampled correction of the critic's error: -> [...].

    `log_pi`, `log_ref`, `log_old` and `q` are [..., V], `taken` int64 [...] the sampled tokens,
    `advantages` [...] their lambda-returns G less Q(x, w_taken), and less a baseline that does not
    depend on them. The exact term is a control variate of the sampled one, so the SAME Q stands in
    both, a pessimistic one too. At pi = pi_old and lambda = 1 the gradient is unbiased for every
    critic that does not depend on the batch. Related: Q-Prop, arXiv 1611.02247; interpolated policy
    gradients, arXiv 1706.00387.
    """
    correction = taken_token_correction(
        at_taken(log_pi, taken), at_taken(log_old, taken), advantages, clip_low, clip_high
    )
    return policy_objective(log_pi, log_ref, log_old, q, beta, eta) + correction


def pessimistic_q(q: Tensor, value: Tensor, log_old: Tensor, pessimism_threshold: float) -> Tensor:
    """min(Q, V(x)) for tokens with pi_old(w) < `pessimism_threshold`: [..., V], [...], [..., V] -> [..., V].

    At a token that was hardly ever sampled Q is extrapolation: the critic's warnings count there,
    its promises do not. `pessimism_threshold` is in [0, 1]; 0 leaves Q as it is. The objective stays unbiased if
    this Q stands in the exact term and in the correction; soft values that meet it in a
    lambda-return must be computed from it too. `value` is E_pi_old[Q], without the KL.
    """
    return torch.where(
        log_old.exp() < pessimism_threshold, torch.minimum(q, value.unsqueeze(-1)), q
    )


def centred_advantage(advantage: Tensor, log_pi: Tensor) -> Tensor:
    """A(x, w) - E_pi[A(x, .)]: [..., V], [..., V] -> [..., V]; no gradient reaches the policy.

    With Q = value + centred advantage, E_pi[Q] is the value head alone (dueling networks, Wang et
    al., arXiv 1511.06581, with pi in place of the uniform mean).
    """
    return advantage - expectation(log_pi.detach(), advantage).unsqueeze(-1)


def dueling_q(value: Tensor, advantage: Tensor, log_pi: Tensor) -> Tensor:
    """Q(x, w) = value(x) + A(x, w) - E_pi[A(x, .)]: [...], [..., V], [..., V] -> [..., V]."""
    return value.unsqueeze(-1) + centred_advantage(advantage, log_pi)


def critic_loss(
    q_taken: Tensor, targets: Tensor, mask: Tensor, kind: str, huber_delta: float = 1.0
) -> Tensor:
    """Per-token loss of Q(x_k, w_k) against its target, 0 where `mask` is false; all [...].

    `kind` is "huber" (quadratic up to an error of `huber_delta`, linear beyond) or "mse" (half the
    squared error, so that both agree on small errors). Targets get no gradient.
    Raises ValueError for another kind.
    """
    if kind not in ("huber", "mse"):
        raise ValueError(f"critic loss must be huber or mse, got {kind!r}")
    targets = targets.detach()
    if kind == "huber":
        loss = F.huber_loss(q_taken, targets, reduction="none", delta=huber_delta)
    else:
        loss = 0.5 * (q_taken - targets).square()
    return torch.where(mask, loss, torch.zeros_like(loss))


def action_weights(gamma: float, step: Tensor) -> Tensor:
    """gamma^t of the action number t in its episode: [B] -> [B], float (default dtype for ints)."""
    return float(gamma) ** step


def rebased_q(q: Tensor, log_ref: Tensor, log_old: Tensor, beta: float) -> Tensor:
    """Q(x, w) + beta log(pi_ref/pi_old): all [..., V]; moves the reference from pi_ref to pi_old.

    With it `policy_objective(log_pi, log_old, None, rebased_q, beta + eta)` equals
    `policy_objective(log_pi, log_ref, log_old, q, beta, eta)`, so that a buffer keeps two tensors
    over the vocabulary in place of three.
    """
    return q + beta * (log_ref - log_old)


def leave_one_out_baseline(errors: Tensor, valid: Tensor) -> Tensor:
    """Mean error over the valid tokens of all OTHER rows: [N, K], bool [N, K] -> [N].

    Rows are independent (one environment each), so that subtracting row n's baseline from its own
    errors G - Q shifts Q(x, .) by a number that its actions had no part in: the doubly robust
    gradient stays unbiased. 0 where no other row has a token. The REINFORCE leave-one-out baseline
    (Kool et al., 2019), applied to what the critic left over.
    """
    errors = torch.where(valid, errors, torch.zeros_like(errors)).sum(1)
    counts = valid.sum(1)
    others = counts.sum() - counts
    return (errors.sum() - errors) / others.clamp(min=1)


def objective_scale(mean_square: Tensor, least: float = 1e-2) -> Tensor:
    """1 / rms of the advantages, `mean_square` their mean square: [] -> [], at most 1 / `least`.

    A factor of the WHOLE policy objective: it keeps the direction of an iteration's gradient, where
    dividing the advantages alone would not; over iterations it gives quiet ones more weight.
    Without it an iteration with a failed action moves the policy far more than one whose rewards
    differ little, for Adam and the norm limit remember the larger gradients.
    """
    return 1 / mean_square.sqrt().clamp(min=least)


def explained_variance(predictions: Tensor, targets: Tensor) -> float:
    """1 - Var(targets - predictions) / Var(targets), at most 1; [K], [K]; 0 where targets agree."""
    variance = targets.var()
    return float(1 - (targets - predictions).var() / variance) if variance > 0 else 0.0
