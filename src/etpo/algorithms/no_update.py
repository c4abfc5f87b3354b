"""Methods without weight updates: zero-shot sampling and Reflexion.

They sample, score and log like the trained algorithms. They differ from each other in the prompts,
which `conf/algorithm` configures. docs/algorithms/reflexion.md lists the differences from the
paper (arXiv 2303.11366).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from lightning import LightningModule
from torch import Tensor

from etpo.algorithms.policy_check import check_policy
from etpo.algorithms.settings import BatchSettings, build_settings
from etpo.models.chunked_logits import in_chunks
from etpo.models.policy import LanguageModelPolicy
from etpo.models.token_columns import TokenColumns
from etpo.rollout.metrics import first_episode_reward, rollout_metrics
from etpo.rollout.types import Actions, Rollout


@dataclass(frozen=True, kw_only=True)
class NoUpdateSettings(BatchSettings):
    """Settings of `NoUpdate`."""


class NoUpdate(LightningModule):
    """Run a pretrained model without an optimizer and without updates.

    Args:
        policy: policy and reference.
        settings: None uses the defaults.
    """

    settings_class = NoUpdateSettings

    def __init__(
        self, policy: LanguageModelPolicy, settings: NoUpdateSettings | None = None
    ) -> None:
        super().__init__()
        self.policy, self.settings = policy, settings or NoUpdateSettings()
        self.strict_loading = False
        self.iteration_metrics: dict[str, float] = {}

    @classmethod
    def from_config(cls, policy: Callable[[], LanguageModelPolicy], **settings: Any) -> Self:
        """Check the settings, then build policy and module."""
        checked = build_settings(cls.settings_class, settings)
        return cls(policy(), checked)

    def setup(self, stage: str) -> None:
        warnings.filterwarnings("ignore", r".*configure_optimizers` returned `None`")

    def configure_optimizers(self) -> None:
        return None

    def check_rollout(self, rollout: Rollout) -> None:
        """Raise ConfigError if the first rollout was not sampled from the model's distribution."""
        check_policy(self, rollout.actions, fresh=False)

    def compute_targets(self, rollout: Rollout) -> Actions:
        """Return the actions unchanged and set the metrics of the iteration."""
        self.iteration_metrics = rollout_metrics(rollout) | {
            "rollout/kl_to_reference": self.kl_to_reference(rollout.actions)
        }
        return rollout.actions

    @torch.no_grad()
    def kl_to_reference(self, actions: Actions) -> float:
        """Compute the mean KL(pi || pi_ref) of an action in nats, 0 without `min_p`.

        pi is pi_ref renormalized over its support: KL = -log(mass of the support).
        """
        if self.policy.min_p == 0:
            return 0.0
        tree = actions.tree()
        recorded = (actions.hidden_states, actions.allowed, actions.support)
        inputs = (x.flatten(0, 1)[tree.first].to(self.device) for x in recorded)

        def mass(hidden: Tensor, *sets: Tensor) -> tuple[Tensor]:
            columns = TokenColumns.of(self.policy.vocabulary_size, *sets)
            return (self.policy.log_probs(hidden, columns).log_support_mass,)

        (log_mass,) = in_chunks(mass, self.settings.logits_chunk_size, *inputs)
        return -float(tree.of_tokens(log_mass.cpu()).sum(1).mean())

    def training_step(self, batch: Actions, batch_idx: int) -> Tensor:
        """Log the metrics and return a zero loss; DDP does not accept None."""
        if batch_idx == 0:
            self.log_dict(
                self.iteration_metrics, on_step=False, on_epoch=True, sync_dist=True, batch_size=1
            )
        return torch.zeros((), device=self.device, requires_grad=True)

    def validation_step(self, batch: Rollout, batch_idx: int) -> None:
        reward = first_episode_reward(batch)
        self.log("val/reward", reward, sync_dist=True, batch_size=batch.num_envs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {}  # the weights are loaded from `model.name_or_path` again
