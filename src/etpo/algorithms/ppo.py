"""What the baselines share: rollouts with the log-probabilities of taken tokens, a clipped step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from etpo.algorithms import baselines as advantages
from etpo.algorithms import losses as objectives
from etpo.algorithms.base import OnPolicyAlgorithm, TokenValues
from etpo.algorithms.returns import at_taken, entropy
from etpo.errors import check_range
from etpo.models import chunked_logits as chunked
from etpo.models.policy import LanguageModelPolicy
from etpo.rollout.metrics import rollout_metrics
from etpo.rollout.types import Actions, Rollout


class TakenBatch(NamedTuple):
    """Annotated actions: what one training step needs, all without gradient."""

    prompt_ids: Tensor  # int64 [B, P]
    prompt_mask: Tensor  # bool [B, P]
    action_ids: Tensor  # int64 [B, L]
    action_mask: Tensor  # bool [B, L]
    old_log_probs: Tensor  # float32 [B, L], log pi_old of the taken tokens
    ref_log_probs: Tensor  # float32 [B, L], log pi_ref of them
    features: Tensor  # [B, L, D], of the frozen reference
    support: Tensor  # bool [B, L, V], tokens of positive pi_old; [B, L, 0] where all are
    old_features: Tensor  # [B, L, D], of pi_old, in place of a support in chunks; else [B, L, 0]
    advantages: Tensor  # float32 [B, L]
    returns: Tensor  # float32 [B, L], what the critic is fitted to; 0 without one
    weights: Tensor  # float32 [B]


class Taken(NamedTuple):
    """Taken tokens under pi_old and pi_ref, and the critic's value of their prefixes."""

    log_pi: Tensor  # float32 [B, L]
    log_ref: Tensor  # float32 [B, L]
    values: Tensor  # float32 [B, L]; 0 without a critic
    entropy: Tensor  # float32 [B, L], of pi_old
    features: Tensor  # [B, L, D]
    support: Tensor  # bool [B, L, V] or [B, L, 0]
    policy_features: Tensor  # [B, L, D] or [B, L, 0]


def at_prompt(said: TokenValues) -> TokenValues:
    """`said` of a critic that is fitted at the prompt alone: nan at the prefixes after it."""
    if said.value is None:
        return said
    value = torch.full_like(said.value, float("nan"))
    value[:, 0] = said.value[:, 0]
    return said._replace(value=value)


class PolicyGradient(OnPolicyAlgorithm):
    """Clipped policy gradient; a subclass says what an action or a token was worth (`credit`).

    critic: builds what values prefixes from the policy, or None.
    gamma: discount between actions, in [0, 1].
    clip: how far the probability ratio counts above and below 1, or None for no limit.
    shared: arguments of `OnPolicyAlgorithm`. Raises ConfigError for values out of range.
    """

    def __init__(
        self,
        policy: Callable[[], LanguageModelPolicy],
        critic: Callable[[LanguageModelPolicy], nn.Module] | None,
        *args: Any,
        gamma: float,
        clip: float | None,
        **shared: Any,
    ) -> None:
        check_range("algorithm.gamma", gamma, 0, 1)
        if clip is not None:
            check_range("algorithm.clip", clip, 0, 1, above=True)
        super().__init__(policy, *args, **shared)
        self.critic = None if critic is None else critic(self.policy)
        self.gamma, self.clip = gamma, clip
        self.mean_length = 1.0

    def credit(self, actions: Actions, taken: Taken, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Advantages and the critic's targets of every taken token: [B, L], [B, L]."""
        raise NotImplementedError

    @torch.no_grad()
    def compute_targets(self, rollout: Rollout) -> TakenBatch:
        actions = Actions(*(field.to(self.device) for field in rollout.actions))
        if self.logits_chunk_size is not None:
            self.hold_old_head()
        taken = self.in_slices(self.evaluate_taken, *self.read_by_policy(actions))
        mask = actions.action_mask
        credited, returns = self.credit(actions, taken, rollout)
        log_ratio = (taken.log_pi - taken.log_ref) * mask
        self.rollout_metrics = rollout_metrics(rollout) | {
            "rollout/kl_to_reference": float(log_ratio.sum(1).mean()),
            "train/entropy": float(self.mean_over_tokens(taken.entropy, mask)),
        }
        batch = TakenBatch(
            prompt_ids=actions.prompt_ids,
            prompt_mask=actions.prompt_mask,
            action_ids=actions.action_ids,
            action_mask=mask,
            old_log_probs=taken.log_pi,
            ref_log_probs=taken.log_ref,
            features=taken.features,
            support=taken.support,
            old_features=taken.policy_features,
            advantages=credited,
            returns=returns,
            weights=torch.ones_like(actions.rewards),
        )
        valued = self.valued(batch)
        self.mean_length = float(self.mean_over_ranks(valued.sum(1).float().mean()))
        if self.critic is not None:
            self.rollout_metrics |= {
                "rollout/value": float(taken.values[:, 0].mean()),
                "rollout/explained_variance": objectives.explained_variance(
                    taken.values[valued], returns[valued]
                ),
            }
        return batch

    def evaluate_taken(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        action_ids: Tensor,
        policy_features: Tensor | None = None,
    ) -> Taken:
        """Policy, reference and critic at the L taken tokens of action_ids [B, L].

        policy_features: [B, L, D], where the sampler has left them.
        """
        inputs = prompt_ids, prompt_mask, action_ids
        none = action_ids[..., None][..., :0]
        if self.logits_chunk_size is None:
            log_probs = self.policy(*inputs, known_features=policy_features).log_probs
            support = log_probs.isfinite() if self.policy.min_p > 0 else none.bool()
            log_pi, entropies = at_taken(log_probs, action_ids), entropy(log_probs)
            log_ref, features, _ = self.policy(*inputs, reference=True)
            log_ref = at_taken(log_ref, action_ids)
            policy_features = none.float()
        else:
            features = self.policy.features(*inputs, reference=True)
            if policy_features is None:
                policy_features = self.policy.features(*inputs)
            log_pi, entropies, log_ref = chunked.in_chunks(
                self.taken_of_features,
                self.logits_chunk_size,
                policy_features,
                features,
                action_ids,
            )
            support = none.bool()
            if self.policy.min_p == 0:
                policy_features = policy_features[..., :0]
        values = torch.zeros_like(log_pi)
        if self.critic is not None:
            values = self.prefix_values(*inputs, features)
        return Taken(log_pi, log_ref, values, entropies, features, support, policy_features)

    def taken_of_features(
        self, policy_features: Tensor, features: Tensor, action_ids: Tensor
    ) -> tuple[Tensor, ...]:
        """log pi, entropy of pi, log pi_ref [...] at taken tokens, of both models' [..., D]."""
        log_pi, _ = self.policy.head(policy_features, action_ids)
        log_ref, _ = self.policy.head(features, action_ids, reference=True)
        return at_taken(log_pi, action_ids), entropy(log_pi), at_taken(log_ref, action_ids)

    def prefix_values(self, *inputs: Tensor) -> Tensor:
        """The critic's values [B, L] of the L prefixes; `inputs` as a critic takes them."""
        assert self.critic is not None
        values: Tensor = self.critic(*inputs)
        return values

    def token_values(self, *inputs: Tensor) -> TokenValues:
        if self.critic is None:
            return TokenValues()
        return TokenValues(self.prefix_values(*inputs[:4]))  # all but the log-probabilities

    def sampled_advantages(self, batch: TakenBatch) -> Tensor:
        return batch.advantages

    def bootstrap_values(self, actions: Actions, rollout: Rollout) -> Tensor:
        """The critic's value of the true next prompt of truncated actions, 0 of others: [B]."""
        values = torch.zeros_like(actions.rewards)
        if len(rollout.bootstrap_ids):
            after = self.at_next_prompts(self.evaluate_taken, rollout)
            values[actions.truncated] = after.values[:, 0]
        return values

    def standardised(self, values: Tensor, mask: Tensor) -> Tensor:
        """(x - mean) / (deviation + 1e-4) over what `mask` marks, on all ranks: [B, L].

        With a smaller term the rounding errors of equal values would become advantages of 1.
        """
        mean = self.mean_over_tokens(values, mask)
        square = self.mean_over_tokens(values.square(), mask)
        deviation = (square - mean.square()).clamp(min=0).sqrt()
        return (values - mean) / (deviation + 1e-4)

    def valued(self, batch: TakenBatch) -> Tensor:
        """The prefixes that the critic is fitted at: bool [B, L]."""
        return batch.action_mask

    def critic_step(self, batch: TakenBatch) -> Tensor:
        """Mean of the critic's regression error over the prefixes that it is fitted at."""
        if self.critic is None:
            return super().critic_step(batch)
        values = self.prefix_values(
            batch.prompt_ids, batch.prompt_mask, batch.action_ids, batch.features
        )
        losses = objectives.critic_loss(values, batch.returns, self.valued(batch), "huber")
        loss = losses.sum() / (len(losses) * self.mean_length)
        self.log_mean("train/critic_loss", loss, len(losses))
        return loss

    def policy_step(self, batch: TakenBatch) -> tuple[Tensor, Tensor]:
        """Means over actions of the clipped surrogate and of the estimated KL(pi_old || pi)."""
        mask = batch.action_mask
        inputs = batch.prompt_ids, batch.prompt_mask, batch.action_ids
        if self.logits_chunk_size is None:
            support = batch.support if batch.support.shape[-1] else None
            log_probs, _, log_kept = self.policy(*inputs, support=support)
            log_pi = at_taken(log_probs, batch.action_ids)
        else:
            log_pi, log_kept = chunked.in_chunks(
                self.kept_of_features,
                self.logits_chunk_size,
                self.policy.features(*inputs),
                batch.action_ids,
                batch.old_features,
                parameters=self.policy.head_parameters(),
            )
        log_pi = torch.where(mask, log_pi, 0.0)
        log_old = torch.where(mask, batch.old_log_probs, 0.0)
        kl = (advantages.k3(log_old, log_pi.detach()) * mask).sum(1).mean()
        losses = self.surrogate(log_pi, log_old, batch) - self.truncation_kl_coef * (
            log_kept * mask
        ).sum(1)
        loss = (losses / self.divisor(batch)).mean()
        self.log_mean("train/policy_loss", loss, len(mask))
        self.log_mean("train/kl_to_old", kl, len(mask))
        self.log_clip_fraction(*self.clipped(log_pi, log_old, mask))
        return loss, kl

    def kept_of_features(
        self, features: Tensor, action_ids: Tensor, old_features: Tensor
    ) -> tuple[Tensor, Tensor]:
        """log pi of taken tokens and log_kept [...], of features of pi and pi_old [..., D]."""
        support = None
        if self.policy.min_p > 0:
            with torch.no_grad():
                support = self.old_head(old_features, action_ids)[0].isfinite()
        log_pi, log_kept = self.policy.head(features, action_ids, support=support)
        return at_taken(log_pi, action_ids), log_kept

    def clipped(self, log_pi: Tensor, log_old: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Which probability ratios are beyond the limits, and which exist: bool [B, K] each.

        log_pi, log_old: of taken tokens [B, L], 0 where the mask is false.
        """
        return objectives.clipped(log_pi, log_old, self.clip, self.clip), mask

    def divisor(self, batch: TakenBatch) -> Tensor:
        """What the loss of every action, a sum over its tokens, is divided by: [B]."""
        return torch.ones_like(batch.weights)

    def surrogate(self, log_pi: Tensor, log_old: Tensor, batch: TakenBatch) -> Tensor:
        """The loss of every action: log pi, log pi_old of taken tokens [B, L], 0 beyond -> [B]."""
        losses = objectives.taken_token_correction(
            log_pi, log_old, batch.advantages, self.clip, self.clip
        )
        return (losses * batch.action_mask).sum(1)
