"""Traces of an iteration: lambda by level, with the ratios of replayed actions."""

from collections.abc import Callable

from torch import Tensor

from etpo.algorithms.returns import adaptive_lambda, traces
from etpo.algorithms.settings import TraceSettings
from etpo.rollout.trajectories import Steps, to_trajectories


def level_traces(
    settings: TraceSettings,
    steps: Steps,
    mask: Tensor,
    ratios: Tensor,
    schedule: Callable[[float], float] = float,
) -> tuple[Tensor, Tensor]:
    """Compute the traces [N, K] of the policy's advantages and of the critic's targets.

    Args:
        mask: bool [B, L], the steps.
        ratios: [B, L], pi_old/mu of the steps.
        schedule: maps a configured lambda of the advantages to this iteration's.
    """
    packed = to_trajectories(ratios, steps.layout)
    inside: Tensor | float = schedule(settings.lambda_)
    if settings.lambda_length_alpha is not None:
        lengths = mask.sum(1, keepdim=True).to(ratios.dtype).expand_as(ratios)
        inside = adaptive_lambda(
            to_trajectories(lengths, steps.layout), settings.lambda_length_alpha
        )
    policy = traces(steps.last, inside, schedule(settings.between), packed)
    if settings.critic_lambda is None:
        return policy, policy
    return policy, traces(steps.last, settings.critic_lambda, settings.critic_lambda, packed)
