"""ETPO: a soft token critic over the vocabulary and an exact policy step (arXiv 2402.06700).

Differences from the paper, each a setting:

1. Targets are TD(lambda) returns with the critic as control variate. Lambda is annealed to 1, where
   the returns are unbiased for any critic. `lambda_=0` with `lambda_anneal_iters=null` is the
   paper's one-step update (equations 12, 13): rewards propagate one token per iteration.
2. The critic is a dueling head on a copy of the language model (`critic=full`), on the frozen model
   with an adapter (`lora`) or without (`frozen_trunk`). `lm_copy` is the paper's critic.
3. The policy objective is doubly robust: the exact term over the vocabulary plus a clipped, sampled
   correction of the critic's error. Its critic is trained on EARLIER iterations only, which keeps
   the gradient of fresh actions at pi = pi_old unbiased; that of replayed actions, which trained
   it, is so with `critic.cross_fit` only. `doubly_robust=false` is the paper's objective.
4. Pessimism: a token with pi_old(w) < `pessimism_threshold` uses min(Q, V). With the default 1 the
   exact term only lowers probabilities, and the sampled correction alone raises them.
5. Both terms are clipped where the probability of a token has changed by `clip` (arXiv
   2602.04879). The KL of whole actions is limited (`max_kl`, nats). A proximal term is optional
   (`eta`).
6. The whole policy objective is divided by the root mean square of the advantages
   (`normalize_by_advantage_rms`).
7. The loss sums over tokens and weights actions by gamma^t, as the regularized return does.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from etpo.algorithms import baselines, losses, returns
from etpo.algorithms.base import Metrics, OnPolicyAlgorithm
from etpo.algorithms.evaluation import (
    PrefixValues,
    TokenEvaluation,
    loss_columns,
    reference_log_probs,
    support_columns,
)
from etpo.algorithms.settings import TraceSettings, bounded, one_of
from etpo.algorithms.traces import level_traces
from etpo.models.chunked_logits import in_chunks, reduce_in_chunks
from etpo.models.critic_heads import DuelingHead
from etpo.models.critics import Critic
from etpo.models.prefix_tree import PrefixTree, first_step
from etpo.models.token_columns import TokenColumns
from etpo.rollout.metrics import rollout_metrics
from etpo.rollout.trajectories import (
    Steps,
    from_trajectories,
    next_values,
    shifted,
    to_trajectories,
    trajectory_steps,
)
from etpo.rollout.types import Actions, PrefixStates, Rollout, TokenBatch


@dataclass(frozen=True, kw_only=True)
class ETPOSettings(TraceSettings):
    """Settings of `ETPO` in addition to `TraceSettings`.

    Args:
        gamma: discount between actions; inside an action it is 1.
        lambda_: TD(lambda) of the returns in the first iteration.
        lambda_anneal_iters: number of iterations in which `lambda_` and `lambda_between` are
            annealed linearly to 1, counted from the first of the run. None: constant.
        eta: weight of the proximal term KL(pi || pi_old).
        pessimism_threshold: tokens with pi_old below it use min(Q, V). 0: none, 1: all.
        doubly_robust: add the sampled correction of the critic's error to the objective.
        normalize_by_advantage_rms: divide the objective by the rms of the advantages.
        clip: clip range of both terms, in `clip_unit`. None: no clipping.
        tau: Polyak step of the target critic after each iteration; 1 copies the critic.
        critic_loss: huber or mse.
        huber_delta: error from which the Huber loss is linear.
    """

    max_kl: float | None = bounded(0.2, above=True)
    gamma: float = bounded(0.99, 0, 1)
    lambda_: float = bounded(0.9, 0, 1)
    lambda_anneal_iters: int | None = bounded(8, 1)
    eta: float = bounded(0.0)
    pessimism_threshold: float = bounded(1.0, 0, 1)
    doubly_robust: bool = True
    normalize_by_advantage_rms: bool = True
    clip: float | None = bounded(0.03, 0, 1, above=True)
    clip_unit: str = one_of("probability", "ratio")
    tau: float = bounded(1.0, 0, 1, above=True)
    critic_loss: str = one_of("huber", "mse")
    huber_delta: float = bounded(1.0, above=True)


class ETPO(OnPolicyAlgorithm):
    """Entropy-regularized token-level policy optimization with a token critic over the vocabulary.

    The returns of replayed actions are Retrace's. Their exact term needs no ratio, because it is an
    expectation under the present policy at a stored prefix; the correction is weighted by
    min(max_replay_ratio, pi_old/mu).

    Arguments as in `OnPolicyAlgorithm`; `settings` is an `ETPOSettings`.
    """

    settings_class = ETPOSettings
    critic_head = DuelingHead
    has_target_critic = True
    replays = cross_fits = True
    critic: Critic
    scale = 1.0  # of the policy objective in this iteration

    def annealed_lambda(self, first: float) -> float:
        """Return a lambda of this iteration from that of the first one."""
        s = self.settings
        return (
            first
            if s.lambda_anneal_iters is None
            else self.annealed(first, 1.0, s.lambda_anneal_iters)
        )

    @torch.no_grad()
    def compute_targets(self, rollout: Rollout) -> TokenBatch:
        actions, old = self.start_iteration(rollout)
        assert old.q_taken is not None
        mask = actions.step_mask
        steps = trajectory_steps(actions, mask, rollout.num_envs, self.settings.gamma)
        ratios = self.replay_ratios(rollout, old)
        values, q_taken = (to_trajectories(x, steps.layout) for x in (old.value, old.q_taken))
        following = next_values(steps, values, self.bootstrap_values(rollout))
        # of the policy's objective and of the critic
        targets, critic_targets = (
            returns.lambda_returns(
                *(steps.rewards, steps.discounts, following, shifted(q_taken)),
                trace,
                steps.continues,
            )
            for trace in level_traces(self.settings, steps, mask, ratios, self.annealed_lambda)
        )
        errors, valid = targets - q_taken, steps.layout.valid
        errors = errors - self.error_baselines(errors, valid, actions, steps)
        advantages = from_trajectories(errors, steps.layout, like=old.value)
        sample_weights = ratios.clamp(max=self.settings.max_replay_ratio)
        if self.settings.normalize_by_advantage_rms:
            square = self.mean_over_tokens((sample_weights * advantages).square(), mask)
            self.scale = float(losses.inverse_rms(square))
        critic_returns = from_trajectories(critic_targets, steps.layout, like=old.value)
        count = rollout.num_fresh
        fresh = mask[:count]
        self.iteration_metrics = rollout_metrics(rollout) | {
            "rollout/kl_to_reference": float((old.kl * mask)[:count].sum(1).mean()),
            "rollout/value": float(old.value.gather(1, first_step(mask))[:count].mean()),
            "rollout/explained_variance": returns.explained_variance(
                old.q_taken[:count][fresh], critic_returns[:count][fresh]
            ),
            "train/entropy": float(self.mean_over_tokens(old.entropy[:count], fresh)),
            **self.replay_metrics(rollout, ratios, mask),
        }
        return TokenBatch(
            *actions[:3],
            actions.step_mask,
            old_log_probs=old.log_pi,
            ref_log_probs=old.log_ref,
            advantages=advantages,
            returns=critic_returns,
            weights=losses.action_weights(self.settings.gamma, actions.step).float(),
            sample_weights=sample_weights,
            tree=old.tree,
            states=old.states,
            fold=self.folds(rollout),
        )

    def error_baselines(
        self, errors: Tensor, valid: Tensor, actions: Actions, steps: Steps
    ) -> Tensor:
        """Return the baselines of the errors [N, K] from other environments of all ranks."""
        keys = baselines.prefix_keys(*actions[:3])
        prefixes = to_trajectories(keys, steps.layout)
        prompts = to_trajectories(keys[:, :1].expand_as(keys), steps.layout)
        count, width = errors.shape
        own = errors, valid.long(), prompts, prefixes
        errors, kept, prompts, prefixes = (self.all_gather_padded(x) for x in own)
        fold = torch.arange(len(errors), device=errors.device) % count % 2
        means = baselines.state_baseline(
            errors, kept.bool(), prompts, prefixes, fold * self.critic.cross_fit
        )
        rows = means.view(-1, count, means.shape[1])[self.global_rank, :, :width]
        return torch.where(valid, rows, torch.zeros_like(rows))

    def evaluate(self, tree: PrefixTree, states: PrefixStates) -> TokenEvaluation:
        states = states._replace(
            critic=self.target_critic.hidden_states(tree, states.ref, states.old)
        )

        def quantities(taken: Tensor, fold: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
            states = PrefixStates(*parts)
            columns = support_columns(self.policy, states)
            log_old, log_ref, q = self.old_distributions(states, columns, fold)
            places = columns.places(taken)
            of_taken = (each.gather(-1, places) for each in (log_old, log_ref, q))
            kl = returns.kl_divergence(log_old, log_ref)
            value = returns.soft_value(log_old, log_ref, q, self.beta)
            return *of_taken, kl, returns.entropy(log_old), value

        inputs = tree.taken, tree.fold, *states
        outputs = in_chunks(quantities, self.settings.logits_chunk_size, *inputs)
        log_pi, log_ref, q_taken = (tree.of_taken(each) for each in outputs[:3])
        kl, entropy, value = (tree.of_tokens(each) for each in outputs[3:])
        return TokenEvaluation(tree, states, log_pi, log_ref, kl, entropy, value, q_taken)

    def old_log_probs(self, states: PrefixStates, columns: TokenColumns) -> Tensor:
        """Compute log pi_old [n, U] of the columns' tokens."""
        log_old, _ = self.policy.log_probs(
            states.old, columns.supported(), lm_head=self.old_lm_head
        )
        return log_old

    def old_distributions(
        self, states: PrefixStates, columns: TokenColumns, fold: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute log pi_old, log pi_ref and the target critic's pessimistic Q: [n, U] each."""
        log_old = self.old_log_probs(states, columns)
        log_ref = reference_log_probs(self.policy, states, columns)
        return log_old, log_ref, self.pessimistic_q(states.critic, columns, log_old, fold)

    def pessimistic_q(
        self, critic_hidden: Tensor, columns: TokenColumns, log_old: Tensor, fold: Tensor
    ) -> Tensor:
        """Compute the pessimistic Q [n, U] of the target critic.

        fold: [n], of the actions; a cross-fitted critic evaluates them with the other fold's head.
        """
        value, scores = self.target_critic.outputs(critic_hidden, columns.ids, 1 - fold)
        if value is None:  # the critic's output is Q
            value, q = returns.expectation(log_old, scores), scores
        else:
            q = losses.dueling_q(value, scores, log_old)
        return losses.pessimistic_q(q, value, log_old, self.settings.pessimism_threshold)

    def critic_loss(self, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """Average the regression loss of Q(x, w) over the taken tokens."""
        s, tree, states = self.settings, batch.tree, batch.states

        def q_of_taken(
            hidden: Tensor, taken: Tensor, fold: Tensor, *parts: Tensor
        ) -> tuple[Tensor]:
            states = PrefixStates(*parts)
            columns = support_columns(self.policy, states)
            value, scores = self.critic.outputs(hidden, columns.ids, fold)
            q_taken = scores.gather(-1, columns.places(taken))
            if value is not None:
                with torch.no_grad():
                    log_old = self.old_log_probs(states, columns)
                q_taken = q_taken + losses.dueling_baseline(value, scores, log_old)[:, None]
            return (q_taken,)

        hidden = self.critic.hidden_states(tree, states.ref, states.old)
        inputs = hidden, tree.taken, tree.fold, *states
        (q_taken,) = in_chunks(q_of_taken, s.logits_chunk_size, *inputs)
        each = losses.critic_loss(
            tree.of_taken(q_taken), batch.returns, batch.step_mask, s.critic_loss, s.huber_delta
        )
        loss = each.sum() / (len(each) * self.mean_length)
        return loss, {"train/critic_loss": (loss, len(batch.weights))}

    def policy_loss(self, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """Sum the policy objective over tokens and average it over actions.

        Steps with one prefix share the exact term, and those with one taken token its correction:
        the clipped surrogate is linear in advantages of one sign.
        """
        s, tree = self.settings, batch.tree
        weights = batch.weights[:, None] * batch.step_mask
        advantages = weights * batch.sample_weights * batch.advantages
        correction = [tree.sum_to_taken(advantages.clamp(min=0))]
        correction += [tree.sum_to_taken(advantages.clamp(max=0))]
        with_mass = s.truncation_kl_coef > 0

        def prefix_losses(
            hidden: Tensor,
            taken: Tensor,
            fold: Tensor,
            weight: Tensor,
            positive: Tensor,
            negative: Tensor,
            *parts: Tensor,
        ) -> tuple[Tensor, Tensor, Tensor]:
            states = PrefixStates(*parts)
            columns = loss_columns(self.policy, states.allowed, states.support, with_mass=with_mass)
            with torch.no_grad():
                log_old, log_ref, q = self.old_distributions(states, columns, fold)
            log_pi, log_mass = self.policy.log_probs(hidden, columns)
            clip = losses.clip_range(log_old, s.clip, s.clip_unit)
            loss = weight * (
                losses.policy_objective(log_pi, log_ref, log_old, q, self.beta, s.eta, clip)
                - s.truncation_kl_coef * log_mass
            )
            places = columns.places(taken)
            new, old = log_pi.gather(-1, places), log_old.gather(-1, places)
            clip = losses.clip_range(old, s.clip, s.clip_unit)
            if s.doubly_robust:
                for each in (positive, negative):
                    loss = loss + losses.clipped_surrogate(new, old, each, clip).sum(-1)
            kl = returns.kl_divergence(log_old, log_pi.detach())
            return loss, kl, losses.is_clipped(new, old, clip).to(kl.dtype)

        loss, (_, kl, clipped) = reduce_in_chunks(
            prefix_losses,
            lambda each, *_: self.scale * each.sum() / len(weights),
            s.logits_chunk_size,
            self.policy.hidden_states(tree),
            tree.taken,
            tree.fold,
            tree.sum_to_prefixes(weights),
            *correction,
            *batch.states,
            parameters=self.policy.lm_head_parameters(),
        )
        metrics: Metrics = {
            "train/policy_loss": (loss, len(weights)),
            "train/kl_to_old": (tree.of_tokens(kl).sum(1).mean(), len(weights)),
        }
        if s.doubly_robust:
            count = int(batch.step_mask.sum())
            metrics["train/clip_fraction"] = tree.of_taken(clipped).sum() / count, count
        return loss, metrics

    def loss_values(
        self,
        tree: PrefixTree,
        states: PrefixStates,
        columns: TokenColumns,
        log_pi: Tensor,
        log_ref: Tensor,
    ) -> PrefixValues:
        critic_hidden = self.target_critic.hidden_states(tree, states.ref, states.old)
        q = self.pessimistic_q(critic_hidden, columns, log_pi, tree.fold)
        return PrefixValues(returns.soft_value(log_pi, log_ref, q, self.beta), q)

    def all_gather_padded(self, rows: Tensor) -> Tensor:
        """Gather [N, K] of every rank, padded with 0 to the widest: [ranks * N, K], by rank."""
        widths: Any = self.all_gather(torch.tensor(rows.shape[1], device=rows.device))
        width = int(widths.max())
        gathered: Any = self.all_gather(pad(rows, (0, width - rows.shape[1])))
        joined: Tensor = gathered.reshape(-1, width)
        return joined

    def sampled_advantages(self, batch: TokenBatch) -> Tensor | None:
        return batch.advantages if self.settings.doubly_robust else None
