"""Policy and critic losses of token-level RL, per prefix; the caller masks, weights and reduces.

The gradient of the policy losses is the gradient of the regularized return J only if the losses are
SUMMED over the tokens of an action and action t is weighted by gamma^t (`action_weights`). A mean
over tokens or a missing gamma^t changes the direction. Every function is pure
and keeps the dtype of its inputs.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from etpo.algorithms.returns import expectation


def policy_objective(
    log_pi: Tensor,
    log_ref: Tensor,
    log_old: Tensor | None,
    q: Tensor,
    beta: float,
    eta: float = 0.0,
    clip: Tensor | float | None = None,
) -> Tensor:
    """L(x) = sum_w pi(w) [beta log(pi/pi_ref) + eta log(pi/pi_old) - Q(x, w)]: [..., V] -> [...].

    Exact over the vocabulary: no sampling, no importance ratio. Only `log_pi`, which must be
    normalized, gets a gradient, E_pi[f grad log pi]: the bracket f is constant because
    E_pi[grad f] = 0. At Q = 0 and pi = pi_ref it is exactly 0, without rounding noise. With eta = 0
    the value is the paper's objective -V(x); eta > 0 adds the proximal term eta KL(pi || pi_old).
    The optimum for a given Q is pi_ref^{beta/(beta+eta)} pi_old^{eta/(beta+eta)}
    exp(Q/(beta+eta)) / Z. ETPO, arXiv 2402.06700.

    With `clip` c, [..., V] or one for all: PPO's surrogate (arXiv 1707.06347, equation 7) of all
    tokens, sum_w pi_old(w) max(ratio F, clip(ratio, 1 - c, 1 + c) F) with F = f - E_pi_old[f] and
    ratio = pi/pi_old. Its gradient at pi = pi_old is that of L; a token whose ratio has left the
    range, `clip_range`, in the direction of its advantage has none.
    Without eta and clip `log_old` may be None.

    Raises:
        ValueError: eta > 0 or a clip without `log_old`.
    """
    # f(w) = beta log(pi/pi_ref) + eta log(pi/pi_old) - Q(x, w)
    cost = beta * (log_pi.detach() - log_ref) - q
    if log_old is None:
        if eta > 0 or clip is not None:
            raise ValueError("eta > 0 or a clip needs log_old")
        return expectation(log_pi, cost.detach())
    if eta > 0:
        cost = cost + eta * (log_pi.detach() - log_old)
    if clip is None:
        return expectation(log_pi, cost.detach())
    log_old = log_old.detach()
    inside = log_old.isfinite() & log_pi.isfinite()  # the gradient of a masked NaN is NaN
    log_pi, log_taken, cost, clip = (
        torch.where(inside, x, torch.zeros_like(log_old))
        for x in (log_pi, log_old, cost.detach(), torch.as_tensor(clip))
    )
    advantage = expectation(log_old, cost).unsqueeze(-1) - cost
    return expectation(log_old, clipped_surrogate(log_pi, log_taken, advantage, clip))


def clip_range(log_old: Tensor, clip: float | None, unit: str) -> Tensor | float | None:
    """Return the change of the ratio pi/pi_old from which a token is clipped: [...] -> [...].

    unit: "ratio" returns `clip` itself, as in PPO. "probability" returns clip / pi_old: the
    gradient of a token ends when its probability has changed by `clip` (binary total variation,
    arXiv 2602.04879, equations 12 and 13). With a ratio, rare tokens move less than frequent ones.
    """
    if clip is None or unit == "ratio":
        return clip
    return clip * (-log_old.detach()).exp()


def clipped_surrogate(
    log_pi_taken: Tensor,
    log_old_taken: Tensor,
    advantage: Tensor,
    clip: Tensor | float | None,
) -> Tensor:
    """Compute -min(ratio A, clip(ratio, 1 - c, 1 + c) A) of the sampled token: all [...] -> [...].

    ratio = pi/pi_old at the taken token. Only `log_pi_taken` gets a gradient. `clip` c: [...], or
    one for all, `clip_range`; None: no clipping. The surrogate of PPO (arXiv 1707.06347, equation
    7).
    """
    advantage = advantage.detach()
    ratio = (log_pi_taken - log_old_taken.detach()).exp()
    if clip is None:
        return -ratio * advantage
    clip = torch.as_tensor(clip)
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def is_clipped(log_pi_taken: Tensor, log_old_taken: Tensor, clip: Tensor | float | None) -> Tensor:
    """Return true where pi/pi_old is outside [1 - clip, 1 + clip]: [...] -> bool [...]."""
    if clip is None:
        return torch.zeros_like(log_pi_taken, dtype=torch.bool)
    ratio = (log_pi_taken.detach() - log_old_taken.detach()).exp()
    return (ratio - 1).abs() > clip


def pessimistic_q(q: Tensor, value: Tensor, log_old: Tensor, threshold: float) -> Tensor:
    """Compute min(Q, V) if pi_old(w) < threshold, else Q: [..., V], [...], [..., V] -> [..., V].

    Q of a rarely sampled token is an extrapolation: min(Q, V) can rate it below the average, but
    never above. threshold in [0, 1]; 0 keeps Q. The objective stays unbiased if the exact term, the
    correction and the soft values of the lambda-returns use this Q. `value` is E_pi_old[Q], without
    the KL. Similar to the threshold of BCQ (arXiv 1812.02900).
    """
    rare = log_old < (math.log(threshold) if threshold > 0 else -math.inf)
    return torch.where(rare, torch.minimum(q, value.unsqueeze(-1)), q)


def dueling_baseline(value: Tensor, advantage: Tensor, log_pi: Tensor) -> Tensor:
    """Compute value - E_pi[A(x, .)]: [...], [..., V], [..., V] -> [...]; no gradient for pi.

    Q(x, w) is the sum of A(x, w) and this baseline, so E_pi[Q] equals `value` (dueling networks,
    Wang et al., arXiv 1511.06581, with a mean over pi instead of a uniform mean).
    """
    return value - expectation(log_pi.detach(), advantage)


def dueling_q(value: Tensor, advantage: Tensor, log_pi: Tensor) -> Tensor:
    """Q(x, w) = value(x) + A(x, w) - E_pi[A(x, .)]: [...], [..., V], [..., V] -> [..., V]."""
    return advantage + dueling_baseline(value, advantage, log_pi).unsqueeze(-1)


def critic_loss(
    predictions: Tensor, targets: Tensor, mask: Tensor, kind: str, huber_delta: float = 1.0
) -> Tensor:
    """Compute the loss per token, 0 where `mask` is false; all [...]. Targets get no gradient.

    Args:
        kind: "huber" (quadratic up to an error of `huber_delta`, linear beyond) or "mse" (half the
            squared error, equal to "huber" for small errors).

    Raises:
        ValueError: another `kind`.
    """
    if kind not in ("huber", "mse"):
        raise ValueError(f"critic loss must be huber or mse, got {kind!r}")
    targets = targets.detach()
    if kind == "huber":
        loss = F.huber_loss(predictions, targets, reduction="none", delta=huber_delta)
    else:
        loss = 0.5 * (predictions - targets).square()
    return torch.where(mask, loss, torch.zeros_like(loss))


def k3(log_pi: Tensor, log_ref: Tensor) -> Tensor:
    """Compute exp(d) - d - 1 with d = log pi_ref - log pi of the sampled tokens: [...] -> [...].

    Unbiased, nonnegative estimate of KL(pi || pi_ref) for tokens that pi sampled (Schulman, 2020),
    with the gradient used by GRPO.
    """
    difference = log_ref - log_pi
    return difference.exp() - difference - 1


def action_weights(gamma: float, step: Tensor) -> Tensor:
    """Return gamma^t for action t of an episode: [B] -> [B], float (default dtype for ints)."""
    return float(gamma) ** step


def inverse_rms(mean_square: Tensor, least: float = 1e-2) -> Tensor:
    """Return 1 / rms of the advantages from their mean square: [] -> [], at most 1 / `least`.

    Scaling the WHOLE policy objective keeps the direction of an iteration's gradient; scaling the
    advantages alone does not. Without it an iteration with a failed action moves the policy far
    more than one with similar rewards, because Adam's moments and the norm limit favour the larger
    gradients.
    """
    return 1 / mean_square.sqrt().clamp(min=least)
