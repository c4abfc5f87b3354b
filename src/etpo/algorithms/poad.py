"""POAD: PPO over tokens with action decomposition (Wen et al., arXiv 2405.15821)."""

from torch import Tensor

from etpo.algorithms.generalized_advantage import GeneralizedAdvantage
from etpo.algorithms.ppo import Taken
from etpo.rollout.types import Actions, Rollout


class POAD(GeneralizedAdvantage):
    """A scalar value per prefix, discount 1 inside an action and gamma between actions.

    The KL penalty stands in the reward of every token. Differs from the paper: no entropy bonus,
    the KL to the reference takes its place, as in the other algorithms here.
    """

    @property
    def token_discount(self) -> float:
        """Discount from one token of an action to the next."""
        return 1.0

    def credit(self, actions: Actions, taken: Taken, rollout: Rollout) -> tuple[Tensor, Tensor]:
        return self.estimate(actions, taken, rollout, actions.action_mask, self.token_discount)
