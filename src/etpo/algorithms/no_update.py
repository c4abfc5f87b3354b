"""Methods without weight updates: zero-shot, best-of-n and Reflexion, as LightningModules.

They sample, score and log as the trained algorithms do. What tells them apart is what the prompts
show, which is the environment's matter: `conf/algorithm/` sets it for each.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from etpo.algorithms.policy_check import check_policy
from etpo.errors import check_integer
from etpo.models.policy import LanguageModelPolicy
from etpo.rollout.metrics import rollout_metrics
from etpo.rollout.types import Actions, Rollout


class NoUpdate(LightningModule):
    """A pretrained model that acts and never changes; the Trainer runs it without an optimizer.

    policy: builds the model; called once all other values are checked.
    forward_batch_size: actions computed at once. Raises ConfigError for values out of range.
    """

    def __init__(
        self, policy: Callable[[], LanguageModelPolicy], *, forward_batch_size: int
    ) -> None:
        check_integer("algorithm.forward_batch_size", forward_batch_size, 1)
        super().__init__()
        self.policy = policy()
        self.forward_batch_size = forward_batch_size
        self.strict_loading = False
        self.rollout_metrics: dict[str, float] = {}

    def setup(self, stage: str) -> None:
        warnings.filterwarnings("ignore", r".*configure_optimizers` returned `None`")

    def configure_optimizers(self) -> None:
        return None

    def check_rollout(self, rollout: Rollout) -> None:
        """Raises ConfigError where a run's first rollout is not of the model's distribution."""
        check_policy(self, self.policy, rollout.actions, self.forward_batch_size)

    def compute_targets(self, rollout: Rollout) -> Actions:
        """The actions as they are."""
        self.rollout_metrics = rollout_metrics(rollout) | {
            "rollout/kl_to_reference": self.kl_to_reference(rollout.actions)
        }
        return rollout.actions

    @torch.no_grad()
    def kl_to_reference(self, actions: Actions) -> float:
        """Mean KL(pi || pi_ref) of an action in nats: 0 but for the tokens that `min_p` cuts off.

        pi is pi_ref on the kept tokens, divided by their mass, hence KL = -log(mass).
        """
        if self.policy.min_p == 0:
            return 0.0
        total = 0.0
        for rows in torch.split(torch.arange(len(actions.rewards)), self.forward_batch_size):
            part = Actions(*(field[rows].to(self.device) for field in actions))
            kept = self.policy(part.prompt_ids, part.prompt_mask, part.action_ids).log_kept
            total -= float((kept * part.action_mask).sum())
        return total / len(actions.rewards)

    def training_step(self, batch: Actions, batch_idx: int) -> Tensor:
        """Logs. The loss is 0 and knows no weight; with None several processes would not run."""
        if batch_idx == 0:
            self.log_dict(
                self.rollout_metrics, on_step=False, on_epoch=True, sync_dist=True, batch_size=1
            )
        return torch.zeros((), device=self.device, requires_grad=True)

    def validation_step(self, batch: Rollout, batch_idx: int) -> None:
        reward = batch.actions.rewards.mean()
        self.log("val/reward", reward, sync_dist=True, batch_size=len(batch.actions.rewards))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves all weights out: they come from `model.name_or_path` again."""
        checkpoint["state_dict"] = {}


class ZeroShot(NoUpdate):
    """Every action answers the first prompt, which knows of no earlier attempt."""


class BestOfN(NoUpdate):
    """As `ZeroShot`; what counts is the best of the n actions so far."""


class Reflexion(NoUpdate):
    """Prompts carry the last error and a memory of earlier attempts (arXiv 2303.11366).

    docs/algorithms/reflexion.md tells what differs from the paper.
    """
