"""ETPO: a soft token critic over the vocabulary and an exact policy step (arXiv 2402.06700).

Differences from the paper, each a setting:

1. Targets are TD(lambda) returns with the critic as control variate. Lambda is annealed to 1, where
   the returns are unbiased for any critic. `lambda_=0` with `lambda_anneal_iters=null` is the
   paper's one-step update (equations 12, 13): rewards propagate one token per iteration.
2. The critic is a dueling head on a copy of the language model (`critic=full`), on the frozen model
   with an adapter (`lora`) or without (`frozen_trunk`). `lm_copy` is the paper's critic.
3. The policy objective is doubly robust: the exact term over the vocabulary plus a clipped, sampled
   correction of the critic's error. Its critic is trained on EARLIER iterations only, which keeps
   the gradient at pi = pi_old unbiased. `doubly_robust=false` is the paper's objective.
4. Pessimism: a token with pi_old(w) < `pessimism_threshold` uses min(Q, V). With the default 1 the
   exact term only lowers probabilities, and the sampled correction alone raises them.
5. A trust region on the KL of whole actions (`max_kl`, nats) and a proximal term (`eta`).
6. The whole policy objective is divided by the root mean square of the advantages
   (`normalize_by_advantage_rms`).
7. The loss sums over tokens and weights actions by gamma^t, as the regularized return does.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from etpo.algorithms import losses, returns
from etpo.algorithms.base import Metrics, OnPolicyAlgorithm
from etpo.algorithms.evaluation import TokenEvaluation, TokenValues
from etpo.algorithms.returns import gather_tokens
from etpo.algorithms.settings import Settings, bounded, one_of
from etpo.models.chunked_logits import in_chunks, reduce_in_chunks
from etpo.models.critics import Critic, DuelingHead
from etpo.rollout.buffer import distinct_rows
from etpo.rollout.metrics import rollout_metrics
from etpo.rollout.trajectories import (
    from_trajectories,
    next_values,
    shifted,
    to_trajectories,
    trajectory_steps,
)
from etpo.rollout.types import Rollout, TokenBatch


@dataclass(frozen=True, kw_only=True)
class ETPOSettings(Settings):
    """Settings of `ETPO` in addition to `Settings`.

    Args:
        gamma: discount between actions; inside an action it is 1.
        lambda_: TD(lambda) of the targets in the first iteration.
        lambda_anneal_iters: number of iterations in which lambda is annealed linearly to 1. None:
            constant.
        eta: weight of the proximal term KL(pi || pi_old).
        pessimism_threshold: tokens with pi_old below it use min(Q, V). 0: none, 1: all.
        doubly_robust: add the sampled correction of the critic's error to the objective.
        normalize_by_advantage_rms: divide the objective by the rms of the advantages.
        clip: PPO's clip range of the correction's probability ratio. None: no clipping.
        tau: Polyak step of the target critic after each iteration; 1 copies the critic.
        critic_loss: huber or mse.
        huber_delta: error from which the Huber loss is linear.
    """

    gamma: float = bounded(0.99, 0, 1)
    lambda_: float = bounded(0.9, 0, 1)
    lambda_anneal_iters: int | None = bounded(8, 1)
    eta: float = bounded(0.05)
    pessimism_threshold: float = bounded(1.0, 0, 1)
    doubly_robust: bool = True
    normalize_by_advantage_rms: bool = True
    clip: float | None = bounded(0.3, 0, 1, above=True)
    tau: float = bounded(1.0, 0, 1, above=True)
    critic_loss: str = one_of("huber", "mse")
    huber_delta: float = bounded(1.0, above=True)


class ETPO(OnPolicyAlgorithm):
    """Entropy-regularized token-level policy optimization with a token critic over the vocabulary.

    Arguments as in `OnPolicyAlgorithm`; `settings` is an `ETPOSettings`.
    """

    settings_class = ETPOSettings
    critic_head = DuelingHead
    has_target_critic = True
    critic: Critic
    scale = 1.0  # of the policy objective in this iteration

    @property
    def lambda_(self) -> float:
        """Lambda of this iteration's targets."""
        s = self.settings
        if s.lambda_anneal_iters is None:
            return float(s.lambda_)
        return self.annealed(s.lambda_, 1.0, s.lambda_anneal_iters)

    @torch.no_grad()
    def compute_targets(self, rollout: Rollout) -> TokenBatch:
        actions, old = self.start_iteration(rollout)
        assert old.q_taken is not None
        mask = actions.action_mask
        steps = trajectory_steps(actions, mask, rollout.num_envs, self.settings.gamma)
        values, q_taken = (to_trajectories(x, steps.layout) for x in (old.value, old.q_taken))
        targets = returns.lambda_returns(
            steps.rewards,
            steps.discounts,
            next_values(steps, values, self.bootstrap_values(rollout)),
            shifted(q_taken),
            self.lambda_,
            steps.continues,
        )
        errors, valid = targets - q_taken, steps.layout.valid
        baselines = returns.leave_one_out_baseline(
            self.all_gather_padded(errors), self.all_gather_padded(valid.long()).bool()
        )
        errors = errors - baselines.view(-1, len(errors))[self.global_rank][:, None]
        advantages = from_trajectories(errors, steps.layout, like=old.value)
        if self.settings.normalize_by_advantage_rms:
            square = self.mean_over_tokens(advantages.square(), mask)
            self.scale = float(losses.inverse_rms(square))
        self.iteration_metrics = rollout_metrics(rollout) | {
            "rollout/kl_to_reference": float((old.kl * mask).sum(1).mean()),
            "rollout/value": float(old.value[:, 0].mean()),
            "rollout/explained_variance": returns.explained_variance(
                q_taken[valid], targets[valid]
            ),
            "train/entropy": float(self.mean_over_tokens(old.entropy, mask)),
        }
        return TokenBatch(
            *actions[:4],
            old_hidden=old.old_hidden,
            ref_hidden=old.ref_hidden,
            old_log_probs=old.log_pi,
            ref_log_probs=old.log_ref,
            advantages=advantages,
            returns=from_trajectories(targets, steps.layout, like=old.value),
            weights=losses.action_weights(self.settings.gamma, actions.step).float(),
            critic_hidden=old.critic_hidden,
        )

    def evaluate(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        action_ids: Tensor,
        old_hidden: Tensor | None = None,
    ) -> TokenEvaluation:
        inputs = prompt_ids, prompt_mask, action_ids
        if old_hidden is None:
            old_hidden = self.policy.hidden_states(*inputs)
        ref_hidden = self.policy.hidden_states(*inputs, reference=True)
        critic_hidden = self.target_critic.hidden_states(*inputs, ref_hidden)

        def quantities(ids: Tensor, *hidden: Tensor) -> tuple[Tensor, ...]:
            log_old, log_ref, q = self.old_distributions(ids, *hidden)
            taken = (gather_tokens(each, ids) for each in (log_old, log_ref, q))
            kl = returns.kl_divergence(log_old, log_ref)
            value = returns.soft_value(log_old, log_ref, q, self.beta)
            return *taken, kl, returns.entropy(log_old), value

        hidden = old_hidden, ref_hidden, critic_hidden
        log_pi, log_ref, q_taken, kl, entropy, value = in_chunks(
            quantities, self.settings.logits_chunk_size, action_ids, *hidden
        )
        return TokenEvaluation(
            *(old_hidden, ref_hidden, log_pi, log_ref, kl, entropy, value, q_taken, critic_hidden)
        )

    def old_distributions(
        self, ids: Tensor, old_hidden: Tensor, ref_hidden: Tensor, critic_hidden: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute log pi_old, log pi_ref and the pessimistic Q of the target critic: [..., V] each.

        Args:
            ids: taken tokens, [...].
            old_hidden, ref_hidden, critic_hidden: hidden states, [..., D] or [..., C].
        """
        log_old, _ = self.policy.log_probs(old_hidden, ids, lm_head=self.old_lm_head)
        log_ref, _ = self.policy.log_probs(ref_hidden, ids, reference=True)
        return log_old, log_ref, self.pessimistic_q(critic_hidden, log_old)

    def pessimistic_q(self, critic_hidden: Tensor, log_old: Tensor) -> Tensor:
        """Compute the pessimistic Q [..., V] of the target critic."""
        value, scores = self.target_critic.head(critic_hidden)
        if value is None:  # the critic's output is Q
            value, q = returns.expectation(log_old, scores), scores
        else:
            q = losses.dueling_q(value, scores, log_old)
        return losses.pessimistic_q(q, value, log_old, self.settings.pessimism_threshold)

    def critic_loss(self, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """Average the regression loss of Q(x, w) over the taken tokens."""
        s = self.settings

        def q_of_tokens(hidden: Tensor, ids: Tensor, old: Tensor) -> tuple[Tensor]:
            value, scores = self.critic.head(hidden)
            q_taken = gather_tokens(scores, ids)
            if value is not None:
                with torch.no_grad():
                    log_old, _ = self.policy.log_probs(old, ids, lm_head=self.old_lm_head)
                q_taken = q_taken + losses.dueling_baseline(value, scores, log_old)
            return (q_taken,)

        distinct, index = distinct_rows(batch)
        hidden = self.critic.hidden_states(*distinct[:3], distinct.ref_hidden)
        (q_taken,) = in_chunks(
            q_of_tokens, s.logits_chunk_size, hidden, distinct.action_ids, distinct.old_hidden
        )
        each = losses.critic_loss(
            q_taken[index], batch.returns, batch.action_mask, s.critic_loss, s.huber_delta
        )
        loss = each.sum() / (len(each) * self.mean_length)
        return loss, {"train/critic_loss": (loss, len(batch.weights))}

    def policy_loss(self, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """Sum the policy objective over tokens and average it over actions."""
        s, mask = self.settings, batch.action_mask
        assert batch.critic_hidden is not None

        def token_losses(
            hidden: Tensor, ids: Tensor, advantages: Tensor, *old_hidden: Tensor
        ) -> tuple[Tensor, Tensor, Tensor]:
            with torch.no_grad():
                log_old, log_ref, q = self.old_distributions(ids, *old_hidden)
            log_pi, log_mass = self.policy.log_probs(hidden, ids, support=log_old.isfinite())
            if s.doubly_robust:
                loss = losses.doubly_robust_objective(
                    log_pi, log_ref, log_old, q, ids, advantages, self.beta, s.eta, s.clip
                )
            else:
                loss = losses.policy_objective(log_pi, log_ref, log_old, q, self.beta, s.eta)
            taken = gather_tokens(log_pi, ids), gather_tokens(log_old, ids)
            kl = returns.kl_divergence(log_old, log_pi.detach())
            clipped = losses.is_clipped(*taken, s.clip).to(kl.dtype)
            return loss - s.truncation_kl_coef * log_mass, kl, clipped

        loss, (_, kl, clipped) = reduce_in_chunks(
            token_losses,
            lambda each, *_: self.scale * ((each * mask).sum(1) * batch.weights).mean(),
            s.logits_chunk_size,
            self.policy.hidden_states(*batch[:3]),
            batch.action_ids,
            batch.advantages,
            batch.old_hidden,
            batch.ref_hidden,
            batch.critic_hidden,
            parameters=self.policy.lm_head_parameters(),
        )
        metrics: Metrics = {
            "train/policy_loss": (loss, len(mask)),
            "train/kl_to_old": ((kl * mask).sum(1).mean(), len(mask)),
        }
        if s.doubly_robust:
            count = int(mask.sum())
            metrics["train/clip_fraction"] = (clipped * mask).sum() / count, count
        return loss, metrics

    def token_values(self, *inputs: Tensor) -> TokenValues:
        prompt_ids, prompt_mask, action_ids, ref_hidden, log_pi, log_ref = inputs
        critic_hidden = self.target_critic.hidden_states(
            prompt_ids, prompt_mask, action_ids, ref_hidden
        )
        q = self.pessimistic_q(critic_hidden, log_pi)
        return TokenValues(returns.soft_value(log_pi, log_ref, q, self.beta), q)

    def all_gather_padded(self, rows: Tensor) -> Tensor:
        """Gather [N, K] of every rank, padded with 0 to the widest: [ranks * N, K], by rank."""
        widths: Any = self.all_gather(torch.tensor(rows.shape[1], device=rows.device))
        width = int(widths.max())
        gathered: Any = self.all_gather(pad(rows, (0, width - rows.shape[1])))
        joined: Tensor = gathered.reshape(-1, width)
        return joined

    def sampled_advantages(self, batch: TokenBatch) -> Tensor | None:
        return batch.advantages if self.settings.doubly_robust else None
