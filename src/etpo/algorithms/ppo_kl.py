"""PPO over whole actions with a KL penalty in the reward, the baseline of arXiv 2402.06700."""

import torch
from torch import Tensor

from etpo.algorithms import losses as objectives
from etpo.algorithms.base import TokenValues
from etpo.algorithms.generalized_advantage import GeneralizedAdvantage
from etpo.algorithms.ppo import Taken, TakenBatch, at_prompt
from etpo.rollout.types import Actions, Rollout


class PPOKL(GeneralizedAdvantage):
    """One step per action: a scalar value of the prompt and the ratio of the whole action.

    The reward of an action carries -beta log(pi/pi_ref) of the action (arXiv 2203.02155).
    """

    def credit(self, actions: Actions, taken: Taken, rollout: Rollout) -> tuple[Tensor, Tensor]:
        mask = actions.action_mask
        whole = taken._replace(
            log_pi=(taken.log_pi * mask).sum(1, keepdim=True),
            log_ref=(taken.log_ref * mask).sum(1, keepdim=True),
            values=taken.values[:, :1],
        )
        credited, returns = self.estimate(actions, whole, rollout, torch.ones_like(mask[:, :1]))
        return credited.expand_as(taken.values), returns.expand_as(taken.values)

    def valued(self, batch: TakenBatch) -> Tensor:
        """The prompt alone has a value."""
        return (
            torch.arange(batch.action_mask.shape[1], device=self.device) < batch.action_mask[:, :1]
        )

    def token_values(self, *inputs: Tensor) -> TokenValues:
        return at_prompt(super().token_values(*inputs))

    def clipped(self, log_pi: Tensor, log_old: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The ratio is that of a whole action."""
        whole = log_pi.sum(1, keepdim=True), log_old.sum(1, keepdim=True)
        return super().clipped(*whole, mask[:, :1])

    def surrogate(self, log_pi: Tensor, log_old: Tensor, batch: TakenBatch) -> Tensor:
        return objectives.taken_token_correction(
            log_pi.sum(1), log_old.sum(1), batch.advantages[:, 0], self.clip, self.clip
        )
