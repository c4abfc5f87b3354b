"""PPO over whole actions with a KL penalty in the reward, the baseline of arXiv 2402.06700."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from etpo.algorithms import advantages, objectives
from etpo.algorithms.policy_gradient import PolicyGradient, Taken, TakenBatch
from etpo.errors import check_range
from etpo.models.backbone import Backbone
from etpo.models.critics import ValueHead
from etpo.rollout.episode import Actions, Rollout, episode_steps, following_values, pack, unpack


class PPOKL(PolicyGradient):
    """One step per action: a scalar value of the prompt and the ratio of the whole action.

    The reward of an action carries -beta log(pi/pi_ref) of the action (arXiv 2203.02155).
    lambda_: of the generalized advantages over actions, in [0, 1]; other arguments as in
    `PolicyGradient`.
    """

    def __init__(
        self,
        backbone: Callable[[], Backbone],
        critic: Callable[..., nn.Module],
        *args: Any,
        lambda_: float,
        **shared: Any,
    ) -> None:
        check_range("algorithm.lambda_", lambda_, 0, 1)
        super().__init__(backbone, functools.partial(critic, head=ValueHead), *args, **shared)
        self.lambda_ = lambda_

    def credit(self, actions: Actions, taken: Taken, rollout: Rollout) -> tuple[Tensor, Tensor]:
        whole = torch.ones_like(actions.action_mask[:, :1])
        steps = episode_steps(actions, whole, rollout.num_envs, self.gamma)
        log_pi, log_ref = (
            (field * actions.action_mask).sum(1, keepdim=True)
            for field in (taken.log_pi, taken.log_ref)
        )
        prompt_values = taken.values[:, :1]
        values = pack(prompt_values, steps.layout)
        credited = advantages.generalized_advantages(
            advantages.penalised_rewards(
                steps.rewards,
                pack(log_pi, steps.layout),
                pack(log_ref, steps.layout),
                self.beta,
                steps.layout.valid,
            ),
            steps.discounts,
            values,
            following_values(steps, prompt_values, self.bootstrap_values(actions, rollout)),
            self.lambda_,
            steps.continues,
        )
        returns = unpack(credited + values, steps.layout, like=prompt_values)
        credited = self.standardised(unpack(credited, steps.layout, like=prompt_values), whole)
        return credited.expand_as(taken.values), returns.expand_as(taken.values)

    def valued(self, batch: TakenBatch) -> Tensor:
        """The prompt alone has a value."""
        return (
            torch.arange(batch.action_mask.shape[1], device=self.device) < batch.action_mask[:, :1]
        )

    def surrogate(self, log_pi: Tensor, log_old: Tensor, batch: TakenBatch) -> Tensor:
        return objectives.taken_token_correction(
            log_pi.sum(1), log_old.sum(1), batch.advantages[:, 0], self.clip, self.clip
        )
