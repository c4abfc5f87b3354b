"""Training batch, metrics and surrogate loss of PPO, REINFORCE and ArCHer."""

import torch
from torch import Tensor

from etpo.algorithms import losses
from etpo.algorithms.base import Metrics, OnPolicyAlgorithm
from etpo.algorithms.evaluation import TokenEvaluation
from etpo.algorithms.returns import explained_variance
from etpo.algorithms.settings import PolicyGradientSettings
from etpo.models.prefix_tree import first_step
from etpo.rollout.metrics import rollout_metrics
from etpo.rollout.types import Actions, Rollout, TokenBatch


def policy_gradient_batch(
    module: OnPolicyAlgorithm,
    rollout: Rollout,
    actions: Actions,
    old: TokenEvaluation,
    advantages: Tensor,
    returns: Tensor,
    ratios: Tensor,
    trained_prefixes: Tensor | None = None,
) -> TokenBatch:
    """Build the training batch and set the metrics of the iteration.

    Args:
        advantages, returns: [B, L] or, for whole actions, [B, 1].
        ratios: pi_old/mu of the steps, shaped as the advantages.
        trained_prefixes: bool [B, L], prefixes that train the critic; None without a critic.
    """
    mask, count = actions.step_mask, rollout.num_fresh
    weights = ratios.clamp(max=module.settings.max_replay_ratio)
    advantages, returns, weights = (x.expand_as(old.value) for x in (advantages, returns, weights))
    fresh = mask[:count]
    module.iteration_metrics = rollout_metrics(rollout) | {
        "rollout/kl_to_reference": float((old.kl * mask)[:count].sum(1).mean()),
        "train/entropy": float(module.mean_over_tokens(old.entropy[:count], fresh)),
        **module.replay_metrics(rollout, ratios, step_mask(mask, ratios)),
    }
    if trained_prefixes is not None:
        trained = trained_prefixes[:count]
        module.iteration_metrics |= {
            "rollout/value": float(old.value.gather(1, first_step(mask))[:count].mean()),
            "rollout/explained_variance": explained_variance(
                old.value[:count][trained], returns[:count][trained]
            ),
        }
    return TokenBatch(
        *actions[:3],
        mask,
        old_log_probs=old.log_pi,
        ref_log_probs=old.log_ref,
        advantages=advantages,
        returns=returns,
        weights=actions.rewards.new_ones(len(mask)),
        sample_weights=weights,
        tree=old.tree,
        states=old.states,
    )


def step_mask(mask: Tensor, steps: Tensor) -> Tensor:
    """Return the mask [B, K] of steps [B, K]: that of tokens [B, L], or whole actions if K < L."""
    if steps.shape[1] == mask.shape[1]:
        return mask
    return torch.ones_like(steps, dtype=torch.bool)


def standardized(module: OnPolicyAlgorithm, values: Tensor, mask: Tensor) -> Tensor:
    """Return (x - mean) / (deviation + 1e-4) over mask and ranks: [B, L], bool [B, L] -> [B, L].

    A smaller epsilon would scale the rounding errors of equal values to advantages of 1.
    """
    mean = module.mean_over_tokens(values, mask)
    square = module.mean_over_tokens(values.square(), mask)
    deviation = (square - mean.square()).clamp(min=0).sqrt()
    return (values - mean) / (deviation + 1e-4)


def clipped_steps(
    settings: PolicyGradientSettings, log_pi: Tensor, log_old: Tensor, advantages: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the clipped surrogate of the steps, and where the ratio is clipped; all [B, K]."""
    clip = losses.clip_range(log_old, settings.clip, settings.clip_unit)
    surrogate = losses.clipped_surrogate(log_pi, log_old, advantages, clip)
    return surrogate, losses.is_clipped(log_pi, log_old, clip)


def surrogate_loss(
    batch: TokenBatch,
    log_pi: Tensor,
    log_mass: Tensor,
    surrogate: Tensor,
    clipped: Tensor,
    truncation_kl_coef: float,
) -> tuple[Tensor, Metrics]:
    """Average surrogate and truncation penalty over actions; return the loss and its metrics.

    Args:
        log_pi, log_mass: [B, L], outputs of `taken_log_probs`.
        surrogate, clipped: [B, K] of the steps; K = L for tokens, 1 for whole actions.
    """
    mask = step_mask(batch.step_mask, surrogate)
    loss = ((surrogate * mask).sum(1) - truncation_kl_coef * log_mass.sum(1)).mean()
    each = losses.k3(batch.old_log_probs, log_pi.detach()) * batch.step_mask
    kl = (batch.sample_weights * each).sum(1).mean()  # samples of pi_old, or weighted ones of mu
    count = int(mask.sum())
    return loss, {
        "train/policy_loss": (loss, len(mask)),
        "train/kl_to_old": (kl, len(mask)),
        "train/clip_fraction": ((clipped * mask).sum() / count, count),
    }
