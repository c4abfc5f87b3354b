"""Training batch, metrics and surrogate loss of PPO, REINFORCE and ArCHer."""

import torch
from torch import Tensor

from etpo.algorithms import losses
from etpo.algorithms.base import Metrics, OnPolicyAlgorithm
from etpo.algorithms.evaluation import TokenEvaluation
from etpo.algorithms.returns import explained_variance
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
    trained_prefixes: Tensor | None = None,
) -> TokenBatch:
    """Build the training batch and set the metrics of the iteration.

    Args:
        advantages, returns: [B, L] or, for whole actions, [B, 1].
        trained_prefixes: bool [B, L], prefixes that train the critic; None without a critic.
    """
    mask = actions.step_mask
    advantages, returns = (x.expand_as(old.value) for x in (advantages, returns))
    module.iteration_metrics = rollout_metrics(rollout) | {
        "rollout/kl_to_reference": float((old.kl * mask).sum(1).mean()),
        "train/entropy": float(module.mean_over_tokens(old.entropy, mask)),
    }
    if trained_prefixes is not None:
        module.iteration_metrics |= {
            "rollout/value": float(old.value.gather(1, first_step(mask)).mean()),
            "rollout/explained_variance": explained_variance(
                old.value[trained_prefixes], returns[trained_prefixes]
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
        tree=old.tree,
        states=old.states,
    )


def standardized(module: OnPolicyAlgorithm, values: Tensor, mask: Tensor) -> Tensor:
    """Return (x - mean) / (deviation + 1e-4) over mask and ranks: [B, L], bool [B, L] -> [B, L].

    A smaller epsilon would scale the rounding errors of equal values to advantages of 1.
    """
    mean = module.mean_over_tokens(values, mask)
    square = module.mean_over_tokens(values.square(), mask)
    deviation = (square - mean.square()).clamp(min=0).sqrt()
    return (values - mean) / (deviation + 1e-4)


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
    mask = batch.step_mask
    if surrogate.shape[1] < mask.shape[1]:  # every action is one step
        mask = torch.ones_like(surrogate, dtype=torch.bool)
    loss = ((surrogate * mask).sum(1) - truncation_kl_coef * log_mass.sum(1)).mean()
    kl = (losses.k3(batch.old_log_probs, log_pi.detach()) * batch.step_mask).sum(1).mean()
    count = int(mask.sum())
    return loss, {
        "train/policy_loss": (loss, len(mask)),
        "train/kl_to_old": (kl, len(mask)),
        "train/clip_fraction": ((clipped * mask).sum() / count, count),
    }
