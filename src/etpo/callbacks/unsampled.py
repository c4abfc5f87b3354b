"""What the critic promises of tokens that were never sampled, and what the policy makes of them."""

from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor

from etpo.algorithms.etpo import ETPO, TokenBatch


class UnsampledTokens(Callback):
    """Logs, over the first minibatch of every iteration, means over its prefixes x.

    A token is unsampled at x if no action of the minibatch takes it there.
    critic/unsampled_advantage: the largest Q(x, w) - V(x) of the unsampled tokens that have
    probability, as the target critic says it; critic/unsampled_advantage_used: the same of the Q in
    the objective, after pessimism. policy/unsampled_before, policy/unsampled_after: probability of
    all unsampled tokens before and after the iteration's updates.
    """

    @torch.no_grad()
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: ETPO, batch: TokenBatch, batch_idx: int
    ) -> None:
        if batch_idx > 0:
            return
        self.batch = batch
        log_old = pl_module.old_distributions(batch)
        self.support = log_old.isfinite()
        self.unsampled = unsampled_tokens(batch.prompt_ids, batch.action_ids, log_old)
        inputs = batch.prompt_ids, batch.prompt_mask, batch.action_ids, batch.features
        outputs = pl_module.target_critic(*inputs)
        value, q = pl_module.values_of(outputs, log_old)
        used = pl_module.q_of(outputs, log_old)
        self.before = {
            "critic/unsampled_advantage": self.largest(q) - value,
            "critic/unsampled_advantage_used": self.largest(used) - value,
            "policy/unsampled_before": self.mass(log_old),
        }

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: ETPO, outputs: Any, batch: TokenBatch, batch_idx: int
    ) -> None:
        if batch_idx + 1 < trainer.num_training_batches:
            return
        inputs = self.batch.prompt_ids, self.batch.prompt_mask, self.batch.action_ids
        log_pi = pl_module.backbone(*inputs, support=self.support).log_probs
        after = {"policy/unsampled_after": self.mass(log_pi)}
        # the prefixes that have an unsampled token
        counted = self.batch.action_mask & self.unsampled.any(-1)
        for name, values in (self.before | after).items():
            pl_module.log_mean(name, values[counted].mean(), int(counted.sum()))

    def largest(self, q: Tensor) -> Tensor:
        """Largest Q of the unsampled tokens: [B, L, V] -> [B, L], -inf where there is none."""
        return q.masked_fill(~self.unsampled, float("-inf")).amax(-1)

    def mass(self, log_pi: Tensor) -> Tensor:
        """Probability of the unsampled tokens: [B, L, V] -> [B, L]."""
        return log_pi.exp().masked_fill(~self.unsampled, 0.0).sum(-1)


def unsampled_tokens(prompt_ids: Tensor, action_ids: Tensor, log_pi: Tensor) -> Tensor:
    """Tokens of positive probability that no row takes at an equal prefix: bool [B, L, V].

    [B, P], [B, L], [B, L, V]; rows with equal prompts and equal first j tokens share prefix j.
    """
    unsampled = log_pi.isfinite()
    for j in range(action_ids.shape[1]):
        prefixes = torch.cat([prompt_ids, action_ids[:, :j]], dim=1)
        _, group = torch.unique(prefixes, dim=0, return_inverse=True)
        taken = torch.zeros_like(unsampled[:, j])
        taken[group, action_ids[:, j]] = True  # row g: what group g takes
        unsampled[:, j] &= ~taken[group]
    return unsampled
