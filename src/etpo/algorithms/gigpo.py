"""GiGPO: policy gradients of whole actions with baselines of episodes and of observations."""

from dataclasses import dataclass

import torch
from torch import Tensor

from etpo.algorithms import baselines
from etpo.algorithms.reinforce import Reinforce, ReinforceSettings
from etpo.algorithms.settings import bounded, one_of


@dataclass(frozen=True, kw_only=True)
class GiGPOSettings(ReinforceSettings):
    """Settings of `GiGPO` in addition to `ReinforceSettings`.

    Args:
        baseline: leave_one_out: mean over other episodes, unbiased. group: standardize within the
            groups, own returns included, as in the paper.
        step_weight: weight omega of the advantage among equal observations.
    """

    clip: float | None = bounded(0.2, 0, 1, above=True)
    baseline: str = one_of("leave_one_out", "group")
    kl_in_loss: bool = True
    step_weight: float = bounded(1.0)


class GiGPO(Reinforce):
    """Use A_episode + omega A_step as the advantage of each token (arXiv 2505.10978, equation 8).

    A_episode compares the return of the whole episode with episodes that begin with the same
    prompt, A_step the return from the action on with actions on the same prompt. Without others,
    `leave_one_out` compares with actions of equal turns, then with all actions.
    """

    settings_class = GiGPOSettings

    def subtract_baseline(self, action_returns: Tensor, groups: baselines.Groups) -> Tensor:
        starts, episode = torch.unique(groups.episode, return_inverse=True)
        of_episodes = self.compare(action_returns[starts], groups.select(starts))
        of_steps = self.compare(action_returns, groups)
        return torch.add(of_episodes[episode], of_steps, alpha=self.settings.step_weight)

    def compare(self, action_returns: Tensor, groups: baselines.Groups) -> Tensor:
        """Return the advantages [B] of returns [B] among those with the same prompt."""
        if self.settings.baseline == "group":
            return baselines.group_standardized(action_returns, groups.prompt)
        return super().subtract_baseline(action_returns, groups)
