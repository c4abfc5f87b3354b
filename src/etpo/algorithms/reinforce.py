"""REINFORCE, RLOO and GRPO: policy gradients of whole actions without a critic."""

from dataclasses import dataclass

import torch
from torch import Tensor

from etpo.algorithms import baselines, losses, returns
from etpo.algorithms.base import Metrics, OnPolicyAlgorithm
from etpo.algorithms.policy_gradient import (
    clipped_steps,
    policy_gradient_batch,
    surrogate_loss,
)
from etpo.algorithms.settings import PolicyGradientSettings, bounded, one_of
from etpo.rollout.trajectories import from_trajectories, to_trajectories, trajectory_steps
from etpo.rollout.types import Rollout, TokenBatch


@dataclass(frozen=True, kw_only=True)
class ReinforceSettings(PolicyGradientSettings):
    """Settings of `Reinforce` in addition to `PolicyGradientSettings`.

    Args:
        baseline: iteration: mean return of the iteration (Williams, 1992).
            leave_one_out: mean over the prompt's actions in other episodes, RLOO (arXiv
            2402.14740). group: standardize over the prompt's actions, GRPO (arXiv 2402.03300).
        kl_in_loss: add beta KL(pi || pi_ref) to the loss (`k3` estimate) instead of subtracting
            beta log(pi/pi_ref) from the reward.
        average_tokens: divide the loss of an action by its number of tokens.
    """

    clip: float | None = bounded(None, 0, 1, above=True)
    baseline: str = one_of("iteration", "leave_one_out", "group")
    kl_in_loss: bool = False
    average_tokens: bool = False


class Reinforce(OnPolicyAlgorithm):
    """Use the action's discounted return minus a baseline as the advantage of each token.

    Returns end with the episode or at its truncation, without bootstrapping. The terms of a
    replayed token are weighted by min(max_replay_ratio, pi_old/mu) and clipped around pi_old; its
    baseline is that of its iteration, and its return that of the policy that sampled the action.
    """

    settings_class = ReinforceSettings
    replays = True

    @torch.no_grad()
    def compute_targets(self, rollout: Rollout) -> TokenBatch:
        s = self.settings
        actions, old = self.start_iteration(rollout)
        whole = actions.action_mask[:, :1]  # every action has a token
        steps = trajectory_steps(actions, whole, rollout.num_envs, s.gamma)
        layout = steps.layout
        log_pi, log_ref = (
            to_trajectories(x.sum(1, keepdim=True), layout) for x in (old.log_pi, old.log_ref)
        )
        beta = 0.0 if s.kl_in_loss else self.beta
        rewards = returns.kl_penalized_rewards(steps.rewards, log_pi, log_ref, beta, layout.valid)
        packed = returns.discounted_returns(rewards, steps.discounts, steps.continues)
        action_returns = from_trajectories(packed, layout, like=old.value[:, :1])
        ids, mask, fresh = actions.prompt_ids, actions.prompt_mask, rollout.num_fresh
        iterations = [slice(row, row + fresh) for row in range(0, len(whole), fresh)]
        advantages = torch.cat(
            [
                self.subtract_baseline(
                    action_returns[rows, 0],
                    baselines.action_groups(
                        ids[rows], mask[rows], actions.step[rows], rollout.num_envs
                    ),
                )
                for rows in iterations
            ]
        )[:, None]
        ratios = self.replay_ratios(rollout, old)
        return policy_gradient_batch(
            self, rollout, actions, old, advantages, action_returns, ratios
        )

    def subtract_baseline(self, action_returns: Tensor, groups: baselines.Groups) -> Tensor:
        """Return the advantages [B] of an iteration from its returns [B] and groups."""
        if self.settings.baseline == "leave_one_out":
            keys = groups.prompt, groups.step, torch.zeros_like(groups.step)
            return action_returns - baselines.mean_of_other_episodes(action_returns, groups, *keys)
        if self.settings.baseline == "group":
            group = baselines.unique_as_one_group(groups.prompt)
            return baselines.group_standardized(action_returns, group)
        return action_returns - self.mean_over_ranks(action_returns.mean())

    def policy_loss(self, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """Sum (or average) the clipped surrogate over tokens and average it over actions."""
        s, weights = self.settings, batch.sample_weights
        log_pi, log_mass = self.taken_log_probs(batch)
        surrogate, clipped = clipped_steps(
            s, log_pi, batch.old_log_probs, weights * batch.advantages
        )
        if s.kl_in_loss:
            surrogate = surrogate + weights * self.beta * losses.k3(log_pi, batch.ref_log_probs)
        if s.average_tokens:
            lengths = batch.step_mask.sum(1, keepdim=True)
            surrogate, log_mass = surrogate / lengths, log_mass / lengths
        return surrogate_loss(batch, log_pi, log_mass, surrogate, clipped, s.truncation_kl_coef)
