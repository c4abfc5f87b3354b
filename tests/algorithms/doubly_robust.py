"""ETPO's policy objective per token, as the sum of its exact term and its sampled correction."""

from etpo.algorithms.losses import clip_range, clipped_surrogate, policy_objective

from ..by_token import gather_tokens


def doubly_robust_objective(
    log_pi, log_ref, log_old, q, taken, advantages, beta, eta=0.0, clip=None
):
    """Add the sampled correction of the critic's error to `policy_objective`: -> [...].

    The exact term is a control variate of the sampled term: both must use the same, possibly
    pessimistic, Q. At pi = pi_old and lambda = 1 the gradient is unbiased for every critic that
    does not depend on the batch. Related: Q-Prop, arXiv 1611.02247; interpolated policy gradients,
    arXiv 1706.00387.

    Args:
        log_pi, log_ref, log_old, q: [..., V].
        taken: int64 [...], the sampled tokens.
        advantages: [...], lambda-returns minus Q(x, w_taken) minus an independent baseline.
        clip: clip range and its unit, as in `clip_range`, of both terms; None: no clipping.
    """
    old_taken = gather_tokens(log_old, taken)
    exact, sampled = (None if clip is None else clip_range(x, *clip) for x in (log_old, old_taken))
    correction = clipped_surrogate(gather_tokens(log_pi, taken), old_taken, advantages, sampled)
    return policy_objective(log_pi, log_ref, log_old, q, beta, eta, exact) + correction
