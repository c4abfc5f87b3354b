"""POAD: PPO over tokens with action decomposition (Wen et al., arXiv 2405.15821)."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from etpo.algorithms.advantages import generalized_advantages, penalised_rewards
from etpo.algorithms.policy_gradient import PolicyGradient, Taken
from etpo.errors import check_range
from etpo.models.backbone import Backbone
from etpo.models.critics import ValueHead
from etpo.rollout.episode import Actions, Rollout, episode_steps, following_values, pack, unpack


class POAD(PolicyGradient):
    """A scalar value per prefix, discount 1 inside an action and gamma between actions.

    The KL penalty stands in the reward of every token. Differs from the paper: no entropy bonus,
    the KL to the reference takes its place, as in the other algorithms here.

    lambda_: of the generalized advantages, in [0, 1]; other arguments as in `PolicyGradient`.
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

    @property
    def token_discount(self) -> float:
        """Discount from one token of an action to the next."""
        return 1.0

    def credit(self, actions: Actions, taken: Taken, rollout: Rollout) -> tuple[Tensor, Tensor]:
        steps = episode_steps(
            actions, actions.action_mask, rollout.num_envs, self.gamma, self.token_discount
        )
        log_pi, log_ref, values = (
            pack(field, steps.layout) for field in (taken.log_pi, taken.log_ref, taken.values)
        )
        advantages = generalized_advantages(
            penalised_rewards(steps.rewards, log_pi, log_ref, self.beta, steps.layout.valid),
            steps.discounts,
            values,
            following_values(steps, taken.values, self.bootstrap_values(actions, rollout)),
            self.lambda_,
            steps.continues,
        )
        returns = unpack(advantages + values, steps.layout, like=taken.values)
        advantages = unpack(advantages, steps.layout, like=taken.values)
        return self.standardised(advantages, actions.action_mask), returns
