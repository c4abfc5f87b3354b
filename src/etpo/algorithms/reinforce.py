"""REINFORCE, RLOO and GRPO: policy gradients of whole actions without a critic."""

import torch
from torch import Tensor

from etpo.algorithms import baselines as advantages
from etpo.algorithms.ppo import PolicyGradient, Taken, TakenBatch
from etpo.rollout.types import Actions, Rollout, episode_steps, pack, unpack


class Reinforce(PolicyGradient):
    """Every token of an action gets the action's discounted return less a baseline.

    The return runs to the end of the episode, or to where the rollout cuts it, and carries the KL
    penalty -beta log(pi/pi_ref) of each of its actions. The baseline is the iteration's mean
    (Williams, 1992).
    """

    def credit(self, actions: Actions, taken: Taken, rollout: Rollout) -> tuple[Tensor, Tensor]:
        returns = self.action_returns(actions, taken, rollout)
        credited = self.relative(returns, actions)[:, None].expand_as(taken.values)
        return credited, torch.zeros_like(taken.values)

    def action_returns(self, actions: Actions, taken: Taken, rollout: Rollout) -> Tensor:
        """sum_k gamma^k (r - beta log(pi/pi_ref)) from each action on: [B]."""
        mask = actions.action_mask
        whole = torch.ones_like(mask[:, :1])
        steps = episode_steps(actions, whole, rollout.num_envs, self.gamma)
        log_pi, log_ref = (
            pack((field * mask).sum(1, keepdim=True), steps.layout)
            for field in (taken.log_pi, taken.log_ref)
        )
        none = torch.zeros_like(steps.rewards)
        returns = advantages.generalized_advantages(
            advantages.penalised_rewards(
                steps.rewards, log_pi, log_ref, self.reward_beta, steps.layout.valid
            ),
            steps.discounts,
            none,
            none,
            1.0,
            steps.continues,
        )
        return unpack(returns, steps.layout, like=taken.values[:, :1]).squeeze(1)

    @property
    def reward_beta(self) -> float:
        """KL coefficient of the penalty in the reward."""
        return self.beta

    def relative(self, returns: Tensor, actions: Actions) -> Tensor:
        """Returns [B] less their baseline."""
        return returns - self.mean_over_ranks(returns.mean())


class RLOO(Reinforce):
    """The baseline is the mean of the other actions on the same prompt (arXiv 2402.14740)."""

    def relative(self, returns: Tensor, actions: Actions) -> Tensor:
        return returns - advantages.group_mean_of_others(returns, groups(actions))


class GRPO(Reinforce):
    """Returns standardised over a prompt's actions; KL in the loss (arXiv 2402.03300).

    The loss of an action is the mean over its tokens; its KL is the `k3` estimate.
    """

    @property
    def reward_beta(self) -> float:
        return 0.0

    def relative(self, returns: Tensor, actions: Actions) -> Tensor:
        return advantages.group_standardised(returns, groups(actions))

    def surrogate(self, log_pi: Tensor, log_old: Tensor, batch: TakenBatch) -> Tensor:
        mask = batch.action_mask
        penalty = (advantages.k3(log_pi, torch.where(mask, batch.ref_log_probs, 0.0)) * mask).sum(1)
        return super().surrogate(log_pi, log_old, batch) + self.beta * penalty

    def divisor(self, batch: TakenBatch) -> Tensor:
        return batch.action_mask.sum(1)


def groups(actions: Actions) -> Tensor:
    """Groups of actions on equal prompts: int64 [B]."""
    return advantages.groups_of_prompts(actions.prompt_ids, actions.prompt_mask)
