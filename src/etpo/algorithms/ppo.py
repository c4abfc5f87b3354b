"""PPO with a KL penalty in the reward, over tokens (POAD, NTPO) or whole actions (PPO-KL)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from etpo.algorithms import losses, returns
from etpo.algorithms.base import Metrics, OnPolicyAlgorithm
from etpo.algorithms.evaluation import PrefixValues, values_of_first
from etpo.algorithms.policy_gradient import (
    clipped_steps,
    policy_gradient_batch,
    standardized,
    surrogate_loss,
)
from etpo.algorithms.settings import (
    PolicyGradientSettings,
    TraceSettings,
    bounded,
    one_of,
)
from etpo.algorithms.traces import level_traces
from etpo.errors import ConfigError
from etpo.models.critic_heads import ValueHead
from etpo.models.prefix_tree import PrefixTree, first_step
from etpo.rollout.trajectories import (
    from_trajectories,
    next_values,
    to_trajectories,
    trajectory_steps,
)
from etpo.rollout.types import PrefixStates, Rollout, TokenBatch


@dataclass(frozen=True, kw_only=True)
class PPOSettings(TraceSettings, PolicyGradientSettings):
    """Settings of `PPO` in addition to `TraceSettings` and `PolicyGradientSettings`.

    With `lambda_between` the advantages of tokens are bi-level (VAGEN, arXiv 2510.16907).

    Args:
        unit: step of the MDP, token or action; a step has one value and one ratio.
        token_discount: discount between the tokens of an action. 1: POAD (arXiv 2405.15821); gamma:
            the naive variant NTPO, which changes the optimum.
    """

    unit: str = one_of("token", "action")
    token_discount: float = bounded(1.0, 0, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unit == "action" and self.lambda_length_alpha is not None:
            raise ConfigError(
                f"algorithm.lambda_length_alpha={self.lambda_length_alpha}: allowed with "
                "algorithm.unit=action is null, since an action is one step"
            )
        if self.unit == "action" and self.clip_unit == "probability":
            raise ConfigError(
                "algorithm.clip_unit=probability: allowed with algorithm.unit=action is ratio, "
                "since the probability of a whole action is far below any clip"
            )


class PPO(OnPolicyAlgorithm):
    """PPO (arXiv 1707.06347) with a scalar critic of prefixes.

    The reward of each step includes -beta log(pi/pi_ref) (arXiv 2203.02155). Unlike in the paper,
    POAD has this KL penalty instead of an entropy bonus. The surrogate of a replayed step, a token
    or a whole action, is weighted by min(max_replay_ratio, pi_old/mu) and clipped around pi_old
    (decoupled objective, arXiv 2110.00641); values are V-trace's (arXiv 1802.01561).

    Raises:
        ConfigError: `lambda_length_alpha` or `clip_unit="probability"` with whole actions as steps.
    """

    replays = True

    settings_class = PPOSettings
    critic_head = ValueHead

    @property
    def over_actions(self) -> bool:
        """True if a step is a whole action."""
        return bool(self.settings.unit == "action")

    @torch.no_grad()
    def compute_targets(self, rollout: Rollout) -> TokenBatch:
        s = self.settings
        actions, old = self.start_iteration(rollout)
        mask, values, log_pi, log_ref = actions.step_mask, old.value, old.log_pi, old.log_ref
        ratios = self.replay_ratios(rollout, old)
        if self.over_actions:
            log_pi, log_ref = (x.sum(1, keepdim=True) for x in (log_pi, log_ref))
            ratios = ratios.prod(1, keepdim=True)
            values = values.gather(1, first_step(mask))
            mask = torch.ones_like(values, dtype=torch.bool)
        steps = trajectory_steps(actions, mask, rollout.num_envs, s.gamma, s.token_discount)
        layout = steps.layout
        value, log_pi, log_ref = (to_trajectories(x, layout) for x in (values, log_pi, log_ref))
        rewards = returns.kl_penalized_rewards(
            steps.rewards, log_pi, log_ref, self.beta, layout.valid
        )
        following = next_values(steps, value, self.bootstrap_values(rollout))
        # of the policy's objective and of the critic
        errors, critic_errors = (
            returns.generalized_advantages(
                *(rewards, steps.discounts, value, following), trace, steps.continues
            )
            for trace in level_traces(s, steps, mask, ratios)
        )
        advantages, errors = (
            from_trajectories(x, layout, like=values) for x in (errors, critic_errors)
        )
        targets = values + ratios.clamp(max=1) * errors
        advantages = standardized(self, advantages, mask)
        trained = self.trained_prefixes(actions.step_mask)
        outputs = advantages, targets, ratios, trained
        return policy_gradient_batch(self, rollout, actions, old, *outputs)

    def trained_prefixes(self, step_mask: Tensor) -> Tensor:
        """Return the mask [B, L] of the prefixes on which the critic is trained."""
        if not self.over_actions:
            return step_mask
        return torch.zeros_like(step_mask).scatter(1, first_step(step_mask), True)

    def critic_loss(self, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """Average the Huber loss of the values over the steps."""
        values = batch.tree.of_tokens(self.prefix_values(batch.tree, batch.states))
        mask = self.trained_prefixes(batch.step_mask)
        steps_per_action = 1.0 if self.over_actions else self.mean_length
        each = losses.critic_loss(values, batch.returns, mask, "huber")
        loss = each.sum() / (len(each) * steps_per_action)
        return loss, {"train/critic_loss": (loss, len(each))}

    def policy_loss(self, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """Sum the clipped surrogate over steps and average it over actions."""
        advantages = batch.sample_weights * batch.advantages
        log_pi, log_mass = self.taken_log_probs(batch)
        new, old = log_pi, batch.old_log_probs
        if self.over_actions:  # the ratio of a whole action
            new, old = (x.sum(1, keepdim=True) for x in (new, old))
            advantages = advantages[:, :1]
        steps = clipped_steps(self.settings, new, old, advantages)
        return surrogate_loss(batch, log_pi, log_mass, *steps, self.settings.truncation_kl_coef)

    def loss_values(self, tree: PrefixTree, states: PrefixStates, *_: Any) -> PrefixValues:
        values = self.prefix_values(tree, states)
        if self.over_actions:  # the critic is trained before the first step only
            values = values_of_first(tree, values)
        return PrefixValues(values)
