"""What POAD, NTPO and PPO-KL share: a scalar critic and generalized advantages over steps."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from etpo.algorithms import baselines as advantages
from etpo.algorithms.ppo import PolicyGradient, Taken
from etpo.errors import check_range
from etpo.models.critics import ValueHead
from etpo.models.policy import LanguageModelPolicy
from etpo.rollout.types import Actions, Rollout, episode_steps, following_values, pack, unpack


class GeneralizedAdvantage(PolicyGradient):
    """A scalar value per step, and the KL penalty in the reward of every step.

    lambda_: of the generalized advantages, in [0, 1]; other arguments as in `PolicyGradient`.
    """

    def __init__(
        self,
        policy: Callable[[], LanguageModelPolicy],
        critic: Callable[..., nn.Module],
        *args: Any,
        lambda_: float,
        **shared: Any,
    ) -> None:
        check_range("algorithm.lambda_", lambda_, 0, 1)
        super().__init__(policy, functools.partial(critic, head=ValueHead), *args, **shared)
        self.lambda_ = lambda_

    def estimate(
        self,
        actions: Actions,
        taken: Taken,
        rollout: Rollout,
        mask: Tensor,
        token_discount: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Standardised advantages and returns of the steps that `mask` marks.

        The mask and the fields of `taken` are [B, L] with tokens as steps, [B, 1] with actions.
        """
        steps = episode_steps(actions, mask, rollout.num_envs, self.gamma, token_discount)
        log_pi, log_ref, values = (
            pack(field, steps.layout) for field in (taken.log_pi, taken.log_ref, taken.values)
        )
        credited = advantages.generalized_advantages(
            advantages.penalised_rewards(
                steps.rewards, log_pi, log_ref, self.beta, steps.layout.valid
            ),
            steps.discounts,
            values,
            following_values(steps, taken.values, self.bootstrap_values(actions, rollout)),
            self.lambda_,
            steps.continues,
        )
        returns = unpack(credited + values, steps.layout, like=taken.values)
        return self.standardised(unpack(credited, steps.layout, like=taken.values), mask), returns
