"""ETPO: a soft token critic over the vocabulary and an exact policy step, as a LightningModule.

What differs from the paper (arXiv 2402.06700), each a config value under `algorithm`:

1. Targets are TD(lambda) with the critic as control variate, and lambda goes to 1, where they are
   unbiased whatever the critic says; `lambda_=0` with `lambda_anneal_iters=null` is the paper's one-step
   update (eq. 12-13), which moves a reward back by one token per iteration.
2. The critic is a dueling head on a copy of the language model (`critic=full`), on the frozen one
   with an adapter (`lora`) or without (`frozen_trunk`); `lm_copy` is the paper's.
3. The policy objective is doubly robust: the exact full-vocabulary term plus a clipped correction
   of the critic's error on the taken token. `doubly_robust=false` is the paper's plain objective.
   The critic of the objective was fitted on EARLIER iterations only, so that the gradient at
   pi = pi_old is unbiased whatever the critic says.
4. Pessimism: where pi_old(w) < `floor` a token takes min(Q, V). The default 1 has the exact term
   suppress what the critic warns of, sampled or not, and leaves what it promises to the sampled
   correction. docs/studies/tuning.md tells what trusting Q did.
5. A trust region on the KL of whole actions (`max_kl`, nats) and a proximal term (`eta`).
6. The whole policy objective is divided by the root mean square of the advantages
   (`normalize_by_advantage_rms`).
7. Tokens are summed, actions weighted by gamma^t: the exact gradient of the regularised return.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from etpo.algorithms import losses as objectives
from etpo.algorithms import returns as soft_bellman
from etpo.algorithms.base import Head, OnPolicyAlgorithm, TokenValues
from etpo.algorithms.returns import at_taken
from etpo.errors import ConfigError, check_integer, check_range
from etpo.models import chunked_logits as chunked
from etpo.models.critics import Critic, polyak_update, target_of
from etpo.models.policy import LanguageModelPolicy
from etpo.rollout.metrics import rollout_metrics
from etpo.rollout.types import (
    Actions,
    Rollout,
    episode_layout,
    episode_steps,
    following_values,
    pack,
    unpack,
)


class TokenBatch(NamedTuple):
    """Annotated actions: what one training step needs, all without gradient.

    With `logits_chunk_size` V stands for 0, without it C and, of pi_old, D.
    """

    prompt_ids: Tensor  # int64 [B, P]
    prompt_mask: Tensor  # bool [B, P]
    action_ids: Tensor  # int64 [B, L]
    action_mask: Tensor  # bool [B, L]
    old_log_probs: Tensor  # float32 [B, L, V], log pi_old
    q: Tensor  # float32 [B, L, V], Q + beta log(pi_ref/pi_old)
    features: Tensor  # [B, L, D], of the frozen reference
    old_features: Tensor  # [B, L, D], of pi_old
    critic_features: Tensor  # [B, L, C], of the target critic
    returns: Tensor  # float32 [B, L], lambda-returns G
    advantages: Tensor  # float32 [B, L], G - Q(x, w) less its leave-one-out mean
    weights: Tensor  # float32 [B], gamma^t


class Annotation(NamedTuple):
    """Per-token quantities of a slice of actions under pi and the target critic.

    With `logits_chunk_size` V stands for 0, without it C and, of the policy, D.
    """

    log_pi: Tensor  # [B, L, V]
    rebased_q: Tensor  # [B, L, V], Q + beta log(pi_ref/pi)
    q_taken: Tensor  # [B, L], Q of the taken tokens
    value: Tensor  # [B, L], soft value V
    kl: Tensor  # [B, L], KL(pi || pi_ref)
    entropy: Tensor  # [B, L], of pi
    features: Tensor  # [B, L, D], of the reference
    policy_features: Tensor  # [B, L, D]
    critic_features: Tensor  # [B, L, C]


class ETPO(OnPolicyAlgorithm):
    """Entropy-regularised token-level policy optimisation.

    critic: builds the token critic from the policy.
    gamma: discount between actions, in [0, 1]. lambda_: of the first iteration, in [0, 1]; it moves
    linearly to 1 over lambda_anneal_iters iterations (>= 1), or stays where that is None.
    eta: weight of KL(pi || pi_old), >= 0. pessimism_threshold: tokens with pi_old below it take min(Q, V), in
    [0, 1]. doubly_robust: doubly robust objective. normalize_by_advantage_rms: divide it by the rms of the
    advantages. clip_low, clip_high: how far below and above 1 the correction's probability ratio
    counts, > 0, clip_low at most 1, or None for no limit. tau: Polyak step of the target critic
    after each iteration, in (0, 1]. shared: arguments of `OnPolicyAlgorithm`.
    Raises ConfigError for values out of range.
    """

    critic: Critic

    def __init__(
        self,
        policy: Callable[[], LanguageModelPolicy],
        critic: Callable[[LanguageModelPolicy], Critic],
        *args: Any,
        gamma: float,
        lambda_: float,
        lambda_anneal_iters: int | None,
        eta: float,
        pessimism_threshold: float,
        doubly_robust: bool,
        normalize_by_advantage_rms: bool,
        clip_low: float | None,
        clip_high: float | None,
        tau: float,
        critic_loss: str,
        huber_delta: float,
        **shared: Any,
    ) -> None:
        infinity = float("inf")
        for key, value, high in (
            ("gamma", gamma, 1),
            ("lambda_", lambda_, 1),
            ("eta", eta, infinity),
            ("pessimism_threshold", pessimism_threshold, 1),
        ):
            check_range(f"algorithm.{key}", value, 0, high)
        for key, limit, high in (("clip_low", clip_low, 1), ("clip_high", clip_high, infinity)):
            if limit is not None:
                check_range(f"algorithm.{key}", limit, 0, high, above=True)
        for key, value, high in (("tau", tau, 1), ("huber_delta", huber_delta, infinity)):
            check_range(f"algorithm.{key}", value, 0, high, above=True)
        for key, flag in (
            ("doubly_robust", doubly_robust),
            ("normalize_by_advantage_rms", normalize_by_advantage_rms),
        ):
            if not isinstance(flag, bool):
                raise ConfigError(f"algorithm.{key}={flag}: allowed are true, false")
        if lambda_anneal_iters is not None:
            check_integer("algorithm.lambda_anneal_iters", lambda_anneal_iters, 1)
        if critic_loss not in ("huber", "mse"):
            raise ConfigError(f"algorithm.critic_loss={critic_loss}: allowed are huber, mse")
        super().__init__(policy, *args, **shared)
        self.critic = critic(self.policy)
        self.target_critic = target_of(self.critic)
        self.gamma, self.eta = gamma, eta
        self.first_lambda, self.lambda_anneal_iters = lambda_, lambda_anneal_iters
        self.pessimism_threshold, self.doubly_robust = pessimism_threshold, doubly_robust
        self.clip_low, self.clip_high = clip_low, clip_high
        self.tau, self.critic_loss, self.huber_delta = tau, critic_loss, huber_delta
        self.mean_length = 1.0
        self.normalize_by_advantage_rms, self.scale = normalize_by_advantage_rms, 1.0

    @property
    def lambda_(self) -> float:
        """lambda of this iteration's targets."""
        if self.lambda_anneal_iters is None:
            return self.first_lambda
        return self.moved(self.first_lambda, 1.0, self.lambda_anneal_iters)

    def annotated_width(self) -> int:
        features = super().annotated_width()
        if self.logits_chunk_size is not None:
            return 2 * features  # the policy's and the critic's, too
        return features + 2 * int(self.policy.vocabulary_size)  # log pi_old and Q

    @torch.no_grad()
    def compute_targets(self, rollout: Rollout) -> TokenBatch:
        """Distributions, soft values and targets of fresh actions, under pi_old."""
        actions = Actions(*(field.to(self.device) for field in rollout.actions))
        if self.logits_chunk_size is not None:
            self.hold_old_head()
        old = self.in_slices(self.evaluate_prefixes, *self.read_by_policy(actions))
        returns = self.lambda_returns(actions, old.value, old.q_taken, rollout)
        layout = episode_layout(actions.action_mask, rollout.num_envs)
        errors = pack(returns - old.q_taken, layout)
        baselines = objectives.leave_one_out_baseline(
            self.of_all_ranks(errors), self.of_all_ranks(layout.valid.long()).bool()
        )
        baseline = baselines.view(-1, len(errors))[self.global_rank]
        advantages = unpack(errors - baseline[:, None], layout, like=returns)
        if self.normalize_by_advantage_rms:
            square = self.mean_over_tokens(advantages.square(), actions.action_mask)
            self.scale = float(objectives.objective_scale(square))
        lengths = actions.action_mask.sum(1).float()
        self.mean_length = float(self.mean_over_ranks(lengths.mean()))
        self.rollout_metrics = rollout_metrics(rollout) | {
            "rollout/kl_to_reference": float((old.kl * actions.action_mask).sum(1).mean()),
            "rollout/value": float(old.value[:, 0].mean()),
            "rollout/explained_variance": objectives.explained_variance(
                old.q_taken[actions.action_mask], returns[actions.action_mask]
            ),
            "train/entropy": float(self.mean_over_tokens(old.entropy, actions.action_mask)),
        }
        return TokenBatch(
            prompt_ids=actions.prompt_ids,
            prompt_mask=actions.prompt_mask,
            action_ids=actions.action_ids,
            action_mask=actions.action_mask,
            old_log_probs=old.log_pi,
            q=old.rebased_q,
            features=old.features,
            old_features=old.policy_features,
            critic_features=old.critic_features,
            returns=returns,
            advantages=advantages,
            weights=objectives.action_weights(self.gamma, actions.step).float(),
        )

    def evaluate_prefixes(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        action_ids: Tensor,
        policy_features: Tensor | None = None,
    ) -> Annotation:
        """Policy, reference and target critic at the L prefixes of action_ids [B, L].

        policy_features: [B, L, D], where the sampler has left them.
        """
        inputs = prompt_ids, prompt_mask, action_ids
        if self.logits_chunk_size is None:
            log_pi = self.policy(*inputs, known_features=policy_features).log_probs
            log_ref, features, _ = self.policy(*inputs, reference=True)
            outputs = self.target_critic(*inputs, features)
            none = features[..., :0]
            q, q_taken, value, kl = self.token_numbers(log_pi, log_ref, outputs, action_ids)
            q = objectives.rebased_q(q, log_ref, log_pi, self.beta)
            entropy = soft_bellman.entropy(log_pi)
            return Annotation(log_pi, q, q_taken, value, kl, entropy, features, none, none)
        features = self.policy.features(*inputs, reference=True)
        critic_features = self.target_critic.features(*inputs, features)
        if policy_features is None:
            policy_features = self.policy.features(*inputs)

        def numbers_of(action_ids: Tensor, *read: Tensor) -> tuple[Tensor, ...]:
            distributions = self.from_features(self.policy.head, action_ids, *read)
            numbers = self.token_numbers(*distributions, action_ids)[1:]
            return *numbers, soft_bellman.entropy(distributions[0])

        read = policy_features, features, critic_features
        none = features[..., :0]
        q_taken, value, kl, entropy = chunked.in_chunks(
            numbers_of, self.logits_chunk_size, action_ids, *read
        )
        numbers = q_taken, value, kl, entropy
        return Annotation(none, none, *numbers, features, policy_features, critic_features)

    def from_features(
        self,
        head: Head,
        action_ids: Tensor,
        policy_features: Tensor,
        features: Tensor,
        critic_features: Tensor,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """log pi by `head`, log pi_ref and the target critic's outputs, of their features [..., D].

        action_ids: the tokens that were taken, [...].
        """
        log_pi, _ = head(policy_features, action_ids)
        log_ref, _ = self.policy.head(features, action_ids, reference=True)
        return log_pi, log_ref, self.target_critic.head(critic_features)

    def token_numbers(
        self, log_pi: Tensor, log_ref: Tensor, outputs: tuple[Tensor, ...], action_ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Q [..., V], after pessimism, and q_taken, value and kl [...] of an `Annotation`.

        log_pi, log_ref: [..., V]; outputs: of the target critic; action_ids: [...].
        """
        q = self.q_of(outputs, log_pi)
        value = soft_bellman.soft_value(log_pi, log_ref, q, self.beta)
        kl = soft_bellman.kl_divergence(log_pi, log_ref)
        return q, at_taken(q, action_ids), value, kl

    def q_of(self, outputs: tuple[Tensor, ...], log_pi: Tensor) -> Tensor:
        """Q [..., V], after pessimism, of a critic's outputs."""
        value, q = self.values_of(outputs, log_pi)
        return objectives.pessimistic_q(q, value, log_pi, self.pessimism_threshold)

    def token_values(self, *inputs: Tensor) -> TokenValues:
        *read, log_pi, log_ref = inputs
        q, _, value, _ = self.token_numbers(log_pi, log_ref, self.target_critic(*read), read[2])
        return TokenValues(value, q)

    def sampled_advantages(self, batch: TokenBatch) -> Tensor | None:
        """The critic's error at the taken token, if the objective corrects it."""
        return batch.advantages if self.doubly_robust else None

    def values_of(self, outputs: tuple[Tensor, ...], log_pi: Tensor) -> tuple[Tensor, Tensor]:
        """E_pi[Q] [...] and Q [..., V] of a critic's outputs, before any pessimism."""
        (q,) = self.heads_of(outputs, log_pi)
        value = outputs[0]
        return soft_bellman.expectation(log_pi, q) if value is None else value, q

    def heads_of(self, outputs: tuple[Tensor, ...], log_pi: Tensor) -> tuple[Tensor, ...]:
        """Q [..., V] of each head that is fitted: value [...] or None, and scores [..., V]."""
        value, scores = outputs
        return (scores if value is None else objectives.dueling_q(value, scores, log_pi),)

    def lambda_returns(
        self, actions: Actions, values: Tensor, q_taken: Tensor, rollout: Rollout
    ) -> Tensor:
        """G [B, L] of soft values [B, L] and Q of the taken tokens [B, L]."""
        steps = episode_steps(actions, actions.action_mask, rollout.num_envs, self.gamma)
        bootstrap = torch.zeros_like(actions.rewards)
        if len(rollout.bootstrap_ids):
            after = self.at_next_prompts(self.evaluate_prefixes, rollout)
            bootstrap[actions.truncated] = after.value[:, 0]
        returns = soft_bellman.lambda_returns(
            steps.rewards,
            steps.discounts,
            following_values(steps, values, bootstrap),
            torch.nn.functional.pad(pack(q_taken, steps.layout)[:, 1:], (0, 1)),
            self.lambda_,
            steps.continues,
        )
        return unpack(returns, steps.layout, like=values)

    def critic_step(self, batch: TokenBatch) -> Tensor:
        """Mean over action tokens of the critic's regression error, over its heads."""
        inputs = batch.prompt_ids, batch.prompt_mask, batch.action_ids, batch.features
        targets = batch.action_ids, batch.returns, batch.action_mask

        def reduce(*losses: Tensor) -> Tensor:
            means = [each.sum() / (len(each) * self.mean_length) for each in losses]
            return torch.stack(means).mean()

        if self.logits_chunk_size is None:
            loss = reduce(*self.errors(self.critic(*inputs), batch.old_log_probs, *targets))
        else:

            def errors_of(states: Tensor, old: Tensor, *targets: Tensor) -> tuple[Tensor, ...]:
                with torch.no_grad():
                    log_old, _ = self.old_head(old, targets[0])
                return self.errors(self.critic.head(states), log_old, *targets)

            read = self.critic.features(*inputs), batch.old_features
            loss, _ = chunked.reduce_in_chunks(
                errors_of,
                reduce,
                self.logits_chunk_size,
                *read,
                *targets,
                parameters=self.critic.head_parameters(),
            )
        self.log_mean("train/critic_loss", loss, len(batch.weights))
        return loss

    def errors(
        self,
        outputs: tuple[Tensor, ...],
        log_old: Tensor,
        action_ids: Tensor,
        returns: Tensor,
        mask: Tensor,
    ) -> tuple[Tensor, ...]:
        """The error [...] at the taken tokens of each head's Q, of a critic's outputs."""
        kind = self.critic_loss, self.huber_delta
        return tuple(
            objectives.critic_loss(at_taken(q, action_ids), returns, mask, *kind)
            for q in self.heads_of(outputs, log_old)
        )

    def policy_step(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Means over actions of the policy objective's token sums, and of KL(pi_old || pi)."""
        mask = batch.action_mask
        inputs = batch.prompt_ids, batch.prompt_mask, batch.action_ids
        taken = batch.action_ids, batch.advantages

        def reduce(losses: Tensor, kl: Tensor, clipped: Tensor) -> Tensor:
            return self.scale * ((losses * mask).sum(1) * batch.weights).mean()

        if self.logits_chunk_size is None:
            old = batch.old_log_probs
            log_pi, _, log_kept = self.policy(*inputs, support=old.isfinite())
            losses, kl, clipped = self.losses(log_pi, log_kept, old, batch.q, *taken)
            loss = reduce(losses, kl, clipped)
        else:

            def losses_of(
                states: Tensor, action_ids: Tensor, advantages: Tensor, *read: Tensor
            ) -> tuple[Tensor, ...]:
                with torch.no_grad():
                    log_old, log_ref, outputs = self.from_features(self.old_head, action_ids, *read)
                    q = self.q_of(outputs, log_old)
                    q = objectives.rebased_q(q, log_ref, log_old, self.beta)
                log_pi, log_kept = self.policy.head(states, action_ids, support=log_old.isfinite())
                return self.losses(log_pi, log_kept, log_old, q, action_ids, advantages)

            read = batch.old_features, batch.features, batch.critic_features
            loss, (_, kl, clipped) = chunked.reduce_in_chunks(
                losses_of,
                reduce,
                self.logits_chunk_size,
                self.policy.features(*inputs),
                *taken,
                *read,
                parameters=self.policy.head_parameters(),
            )
        kl = (kl * mask).sum(1).mean()
        self.log_mean("train/policy_loss", loss, len(mask))
        self.log_mean("train/kl_to_old", kl, len(mask))
        if self.doubly_robust:
            self.log_clip_fraction(clipped, mask)
        return loss, kl

    def losses(
        self,
        log_pi: Tensor,
        log_kept: Tensor,
        log_old: Tensor,
        q: Tensor,
        action_ids: Tensor,
        advantages: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The policy objective, KL(pi_old || pi) and 1 where the ratio is clipped, [...] each.

        log_pi, log_old and q, which is rebased to pi_old: [..., V]; the others [...].
        """
        kl = soft_bellman.kl_divergence(log_old, log_pi.detach())
        clip = self.clip_low, self.clip_high
        both = at_taken(log_pi, action_ids), at_taken(log_old, action_ids)
        clipped = objectives.clipped(*both, *clip).to(kl.dtype)
        coefficient = self.beta + self.eta
        if self.doubly_robust:
            losses = objectives.doubly_robust_objective(
                log_pi,
                log_old,  # what q is rebased to
                log_old,
                q,
                action_ids,
                advantages,
                coefficient,
                0.0,
                *clip,
            )
        else:
            losses = objectives.policy_objective(log_pi, log_old, None, q, coefficient)
        return losses - self.truncation_kl_coef * log_kept, kl, clipped

    def old_distributions(self, batch: TokenBatch) -> Tensor:
        """log pi_old [B, L, V], which a batch itself may lack."""
        if self.logits_chunk_size is None:
            return batch.old_log_probs
        return self.old_head(batch.old_features, batch.action_ids)[0]

    def on_train_epoch_end(self) -> None:
        polyak_update(self.target_critic, self.critic, self.tau)
