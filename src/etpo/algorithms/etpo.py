"""ETPO: a soft token critic over the vocabulary and an exact policy step, as a LightningModule.

What differs from the paper (arXiv 2402.06700), each a config value under `algorithm`:

1. Targets are TD(lambda) with the critic as control variate; `lambda_=0` is the paper's one-step
   update (eq. 12-13), which moves a reward back by one token per iteration.
2. The critic is a dueling head on a copy of the language model (`critic=full`), on the frozen one
   with an adapter (`lora`) or without (`frozen_trunk`); `lm_copy` is the paper's.
3. The policy objective is doubly robust: the exact full-vocabulary term plus a clipped correction
   of the critic's error on the taken token. `correction=false` is the paper's plain objective.
   The critic of the objective was fitted on EARLIER iterations only, so that the gradient at
   pi = pi_old is unbiased whatever the critic says.
4. Pessimism: where pi_old(w) < `floor` a token takes min(Q, V). The default 1 has the exact term
   suppress what the critic warns of, sampled or not, and leaves what it promises to the sampled
   correction. docs/studies/tuning.md tells what trusting Q did.
5. A trust region on the KL of whole actions (`max_kl`, nats) and a proximal term (`eta`).
6. The whole policy objective is divided by the root mean square of the advantages
   (`scale_objective`).
7. Tokens are summed, actions weighted by gamma^t: the exact gradient of the regularised return.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from etpo.algorithms import objectives, soft_bellman
from etpo.algorithms.on_policy import OnPolicyAlgorithm, TokenValues
from etpo.errors import ConfigError, check_range
from etpo.models.backbone import Backbone
from etpo.models.critics import polyak_update, target_of
from etpo.rollout.episode import (
    Actions,
    Rollout,
    episode_layout,
    episode_steps,
    following_values,
    pack,
    unpack,
)
from etpo.rollout.metrics import rollout_metrics


class TokenBatch(NamedTuple):
    """Annotated actions: what one training step needs, all without gradient."""

    prompt_ids: Tensor  # int64 [B, P]
    prompt_mask: Tensor  # bool [B, P]
    action_ids: Tensor  # int64 [B, L]
    action_mask: Tensor  # bool [B, L]
    old_log_probs: Tensor  # float32 [B, L, V], log pi_old
    q: Tensor  # float32 [B, L, V], Q + beta log(pi_ref/pi_old)
    features: Tensor  # [B, L, D], of the frozen reference
    returns: Tensor  # float32 [B, L], lambda-returns G
    advantages: Tensor  # float32 [B, L], G - Q(x, w) less its leave-one-out mean
    weights: Tensor  # float32 [B], gamma^t


class Annotation(NamedTuple):
    """Per-token quantities of a slice of actions under pi_old and the target critic."""

    log_pi: Tensor  # [B, L, V]
    rebased_q: Tensor  # [B, L, V], Q + beta log(pi_ref/pi)
    q_taken: Tensor  # [B, L], Q of the taken tokens
    value: Tensor  # [B, L], soft value V
    kl: Tensor  # [B, L], KL(pi || pi_ref)
    features: Tensor  # [B, L, D]


class ETPO(OnPolicyAlgorithm):
    """Entropy-regularised token-level policy optimisation.

    critic: builds the token critic from the backbone.
    gamma: discount between actions, in [0, 1]. lambda_: in [0, 1].
    eta: weight of KL(pi || pi_old), >= 0. floor: tokens with pi_old below it take min(Q, V), in
    [0, 1]. correction: doubly robust objective. scale_objective: divide it by the rms of the
    advantages. clip_low, clip_high: how far below and above 1 the correction's probability ratio
    counts, > 0, clip_low at most 1, or None for no limit. tau: Polyak step of the target critic
    after each iteration, in (0, 1]. shared: arguments of `OnPolicyAlgorithm`.
    Raises ConfigError for values out of range.
    """

    critic: nn.Module

    def __init__(
        self,
        backbone: Callable[[], Backbone],
        critic: Callable[[Backbone], nn.Module],
        *args: Any,
        gamma: float,
        lambda_: float,
        eta: float,
        floor: float,
        correction: bool,
        scale_objective: bool,
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
            ("floor", floor, 1),
        ):
            check_range(f"algorithm.{key}", value, 0, high)
        for key, limit, high in (("clip_low", clip_low, 1), ("clip_high", clip_high, infinity)):
            if limit is not None:
                check_range(f"algorithm.{key}", limit, 0, high, above=True)
        for key, value, high in (("tau", tau, 1), ("huber_delta", huber_delta, infinity)):
            check_range(f"algorithm.{key}", value, 0, high, above=True)
        for key, flag in (("correction", correction), ("scale_objective", scale_objective)):
            if not isinstance(flag, bool):
                raise ConfigError(f"algorithm.{key}={flag}: allowed are true, false")
        if critic_loss not in ("huber", "mse"):
            raise ConfigError(f"algorithm.critic_loss={critic_loss}: allowed are huber, mse")
        super().__init__(backbone, *args, **shared)
        self.critic = critic(self.backbone)
        self.target_critic = target_of(self.critic)
        self.gamma, self.lambda_, self.eta = gamma, lambda_, eta
        self.floor, self.correction = floor, correction
        self.clip_low, self.clip_high = clip_low, clip_high
        self.tau, self.critic_loss, self.huber_delta = tau, critic_loss, huber_delta
        self.mean_length = 1.0
        self.scale_objective, self.scale = scale_objective, 1.0

    @torch.no_grad()
    def annotate(self, rollout: Rollout) -> TokenBatch:
        """Distributions, soft values and targets of fresh actions, under pi_old."""
        actions = Actions(*(field.to(self.device) for field in rollout.actions))
        old = self.in_slices(self.evaluate_prefixes, actions)
        returns = self.lambda_returns(actions, old.value, old.q_taken, rollout)
        layout = episode_layout(actions.action_mask, rollout.num_envs)
        errors = pack(returns - old.q_taken, layout)
        baselines = objectives.leave_one_out_baseline(
            self.of_all_ranks(errors), self.of_all_ranks(layout.valid.long()).bool()
        )
        baseline = baselines.view(-1, len(errors))[self.global_rank]
        advantages = unpack(errors - baseline[:, None], layout, like=returns)
        if self.scale_objective:
            square = advantages[actions.action_mask].square().mean()
            self.scale = float(objectives.objective_scale(self.mean_over_ranks(square)))
        lengths = actions.action_mask.sum(1).float()
        self.mean_length = float(self.mean_over_ranks(lengths.mean()))
        self.rollout_metrics = rollout_metrics(rollout) | {
            "rollout/kl_to_reference": float((old.kl * actions.action_mask).sum(1).mean()),
            "rollout/value": float(old.value[:, 0].mean()),
            "rollout/explained_variance": objectives.explained_variance(
                old.q_taken[actions.action_mask], returns[actions.action_mask]
            ),
        }
        return TokenBatch(
            prompt_ids=actions.prompt_ids,
            prompt_mask=actions.prompt_mask,
            action_ids=actions.action_ids,
            action_mask=actions.action_mask,
            old_log_probs=old.log_pi,
            q=old.rebased_q,
            features=old.features,
            returns=returns,
            advantages=advantages,
            weights=objectives.action_weights(self.gamma, actions.step).float(),
        )

    def evaluate_prefixes(
        self, prompt_ids: Tensor, prompt_mask: Tensor, action_ids: Tensor
    ) -> Annotation:
        """Policy, reference and target critic at the L prefixes of action_ids [B, L]."""
        inputs = prompt_ids, prompt_mask, action_ids
        log_pi = self.backbone(*inputs).log_probs
        log_ref, features, _ = self.backbone(*inputs, reference=True)
        value, q = self.soft_values(*inputs, features, log_pi, log_ref)
        return Annotation(
            log_pi=log_pi,
            rebased_q=objectives.rebased_q(q, log_ref, log_pi, self.beta),
            q_taken=q.gather(-1, action_ids.unsqueeze(-1)).squeeze(-1),
            value=value,
            kl=soft_bellman.kl_divergence(log_pi, log_ref),
            features=features,
        )

    def soft_values(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """V [B, L] and Q [B, L, V] of the target critic, after pessimism; as `token_values`."""
        log_pi, log_ref = inputs[-2:]
        value, q = self.critic_values(self.target_critic, *inputs[:-1])
        q = objectives.pessimistic_q(q, value, log_pi, self.floor)
        return soft_bellman.soft_value(log_pi, log_ref, q, self.beta), q

    def token_values(self, *inputs: Tensor) -> TokenValues:
        return TokenValues(*self.soft_values(*inputs))

    def sampled_advantages(self, batch: TokenBatch) -> Tensor | None:
        """The critic's error at the taken token, if the objective corrects it."""
        return batch.advantages if self.correction else None

    def critic_values(
        self,
        critic: nn.Module,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        action_ids: Tensor,
        features: Tensor,
        log_pi: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """E_pi[Q] [B, L] and Q [B, L, V] of a critic, before any pessimism."""
        value, scores = critic(prompt_ids, prompt_mask, action_ids, features)
        if value is None:
            return soft_bellman.expectation(log_pi, scores), scores
        return value, objectives.dueling_q(value, scores, log_pi)

    def lambda_returns(
        self, actions: Actions, values: Tensor, q_taken: Tensor, rollout: Rollout
    ) -> Tensor:
        """G [B, L] of soft values [B, L] and Q of the taken tokens [B, L]."""
        steps = episode_steps(actions, actions.action_mask, rollout.num_envs, self.gamma)
        bootstrap = torch.zeros_like(actions.rewards)
        if len(rollout.bootstrap_ids):
            prompts = rollout.bootstrap_ids.to(self.device), rollout.bootstrap_mask.to(self.device)
            none_taken = torch.zeros_like(prompts[0][:, :1])
            bootstrap[actions.truncated] = self.evaluate_prefixes(*prompts, none_taken).value[:, 0]
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
        """Mean over action tokens of the critic's regression error."""
        inputs = batch.prompt_ids, batch.prompt_mask, batch.action_ids, batch.features
        _, q = self.critic_values(self.critic, *inputs, batch.old_log_probs)
        loss = self.regression(q, batch)
        self.log_mean("train/critic_loss", loss, len(q))
        return loss

    def regression(self, q: Tensor, batch: TokenBatch) -> Tensor:
        """Mean over action tokens of the error of Q [B, L, V] at the taken token."""
        q_taken = q.gather(-1, batch.action_ids.unsqueeze(-1)).squeeze(-1)
        losses = objectives.critic_loss(
            q_taken, batch.returns, batch.action_mask, self.critic_loss, self.huber_delta
        )
        return losses.sum() / (len(losses) * self.mean_length)

    def policy_step(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Means over actions of the policy objective's token sums, and of KL(pi_old || pi)."""
        mask = batch.action_mask
        log_pi, _, log_kept = self.backbone(
            batch.prompt_ids,
            batch.prompt_mask,
            batch.action_ids,
            support=batch.old_log_probs.isfinite(),
        )
        kl = soft_bellman.kl_divergence(batch.old_log_probs, log_pi.detach())
        kl = (kl * mask).sum(1).mean()
        losses = objectives.policy_objective(
            log_pi, batch.old_log_probs, None, batch.q, self.beta + self.eta
        )
        if self.correction:
            taken = batch.action_ids.unsqueeze(-1)
            losses = losses + objectives.taken_token_correction(
                log_pi.gather(-1, taken).squeeze(-1),
                batch.old_log_probs.gather(-1, taken).squeeze(-1),
                batch.advantages,
                self.clip_low,
                self.clip_high,
            )
        losses = losses - self.leak * log_kept
        loss = self.scale * ((losses * mask).sum(1) * batch.weights).mean()
        self.log_mean("train/policy_loss", loss, len(mask))
        self.log_mean("train/kl_to_old", kl, len(mask))
        return loss, kl

    def on_train_epoch_end(self) -> None:
        polyak_update(self.target_critic, self.critic, self.tau)
