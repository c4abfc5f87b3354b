"""ETPO: a soft token critic over the vocabulary and an exact policy step, as a LightningModule.

What differs from the paper (arXiv 2402.06700), each a config value under `algorithm`:

1. Targets are TD(lambda) with the critic as control variate; `lambda_=0` is the paper's one-step
   update (eq. 12-13), which moves a reward back by one token per iteration.
2. The critic is a dueling head on a copy of the language model (`critic=trunk`), or on the frozen
   reference's features (`critic=head`), which costs no further model.
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

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from etpo.algorithms import objectives, soft_bellman
from etpo.errors import ConfigError, check_integer, check_range
from etpo.models.backbone import Backbone
from etpo.models.critics import polyak_update
from etpo.rollout.episode import Actions, Rollout, episode_layout, pack, unpack
from etpo.rollout.metrics import rollout_metrics
from etpo.rollout.replay import by_length

# A training step's actions are computed in so many groups of similar length: less padding.
LENGTH_GROUPS = 2


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


class ETPO(LightningModule):
    """Entropy-regularised token-level policy optimisation.

    backbone: builds policy and reference; called once all other values are checked.
    critic: builds the token critic from the backbone.
    optimizer: builds an optimizer from parameter groups (policy first, then critic).
    scheduler: builds what sets its learning rates after every iteration, or None.
    beta: KL coefficient, >= 0; it moves linearly to beta_end_factor (>= 0) times that over
    beta_iters iterations. gamma: discount between actions, in [0, 1]. lambda_: in [0, 1].
    eta: weight of KL(pi || pi_old), >= 0. floor: tokens with pi_old below it take min(Q, V), in
    [0, 1]. correction: doubly robust objective. scale_objective: divide it by the rms of the
    advantages. clip_low, clip_high: how far below and above 1 the correction's probability ratio
    counts, > 0, clip_low at most 1, or None for no limit. leak: weight of KL(pi || softmax), the
    softmax's mass on tokens that `min_p` cut off, >= 0.
    max_kl: the policy stops for the rest of the iteration once the mean KL(pi_old || pi) of an
    action exceeds it, in nats; None for no limit. tau: Polyak step of the target critic after
    each iteration, in (0, 1]. max_grad_norm: per parameter group. annotation_batch:
    actions annotated at once. Raises ConfigError for values out of range.
    """

    def __init__(
        self,
        backbone: Callable[[], Backbone],
        critic: Callable[[Backbone], nn.Module],
        optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
        *,
        beta: float,
        beta_end_factor: float,
        beta_iters: int,
        gamma: float,
        lambda_: float,
        eta: float,
        floor: float,
        correction: bool,
        scale_objective: bool,
        clip_low: float | None,
        clip_high: float | None,
        leak: float,
        max_kl: float | None,
        tau: float,
        policy_lr: float,
        critic_lr: float,
        critic_loss: str,
        huber_delta: float,
        max_grad_norm: float,
        annotation_batch: int,
    ) -> None:
        super().__init__()
        infinity = float("inf")
        for key, value, low, high in (
            ("beta", beta, 0, infinity),
            ("beta_end_factor", beta_end_factor, 0, infinity),
            ("gamma", gamma, 0, 1),
            ("lambda_", lambda_, 0, 1),
            ("eta", eta, 0, infinity),
            ("floor", floor, 0, 1),
            ("leak", leak, 0, infinity),
            ("policy_lr", policy_lr, 0, infinity),
            ("critic_lr", critic_lr, 0, infinity),
        ):
            check_range(f"algorithm.{key}", value, low, high)
        for key, value, high in (
            ("clip_low", clip_low, 1),
            ("clip_high", clip_high, infinity),
            ("max_kl", max_kl, infinity),
            ("tau", tau, 1),
            ("huber_delta", huber_delta, infinity),
            ("max_grad_norm", max_grad_norm, infinity),
        ):
            if value is not None or key not in ("clip_low", "clip_high", "max_kl"):
                check_range(f"algorithm.{key}", value, 0, high, above=True)
        check_integer("algorithm.annotation_batch", annotation_batch, 1)
        check_integer("algorithm.beta_iters", beta_iters, 1)
        for key, value in (("correction", correction), ("scale_objective", scale_objective)):
            if not isinstance(value, bool):
                raise ConfigError(f"algorithm.{key}={value}: allowed are true, false")
        if critic_loss not in ("huber", "mse"):
            raise ConfigError(f"algorithm.critic_loss={critic_loss}: allowed are huber, mse")
        self.backbone = backbone()
        self.critic = critic(self.backbone)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.optimizer, self.scheduler = optimizer, scheduler
        self.first_beta, self.last_beta = beta, beta * beta_end_factor
        self.beta_iters = beta_iters
        self.gamma, self.lambda_, self.eta = gamma, lambda_, eta
        self.floor, self.correction, self.max_kl = floor, correction, max_kl
        self.clip_low, self.clip_high, self.leak = clip_low, clip_high, leak
        self.tau, self.policy_lr, self.critic_lr = tau, policy_lr, critic_lr
        self.critic_loss, self.huber_delta = critic_loss, huber_delta
        self.max_grad_norm, self.annotation_batch = max_grad_norm, annotation_batch
        self.strict_loading = False
        self.policy_stopped = False
        self.step_kls: list[Tensor] = []
        self.mean_length = 1.0
        self.scale_objective, self.scale = scale_objective, 1.0
        self.rollout_metrics: dict[str, float] = {}

    @property
    def beta(self) -> float:
        """The KL coefficient of this iteration."""
        progress = min(self.current_epoch / self.beta_iters, 1.0)
        return self.first_beta + (self.last_beta - self.first_beta) * progress

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.optimizer(
            [
                {"params": self.backbone.policy_parameters(), "lr": self.policy_lr},
                {"params": list(self.critic.parameters()), "lr": self.critic_lr},
            ]
        )
        if self.scheduler is None:
            return {"optimizer": optimizer}
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler(optimizer)}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, **_: Any) -> None:
        """Clips the policy's and the critic's gradient norm apart."""
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], self.max_grad_norm)

    @torch.no_grad()
    def annotate(self, rollout: Rollout) -> TokenBatch:
        """Distributions, soft values and targets of fresh actions, under pi_old."""
        actions = Actions(*(field.to(self.device) for field in rollout.actions))
        parts = [
            self.evaluate_prefixes(part.prompt_ids, part.prompt_mask, part.action_ids)
            for part in (
                Actions(*(field[rows] for field in actions))
                for rows in torch.arange(len(actions.rewards)).split(self.annotation_batch)
            )
        ]
        old = Annotation(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
        returns = self.lambda_returns(actions, old.value, old.q_taken, rollout)
        layout = episode_layout(actions.action_mask, rollout.num_envs)
        errors = pack(returns - old.q_taken, layout)
        baseline = objectives.leave_one_out_baseline(errors, layout.valid)
        advantages = unpack(errors - baseline[:, None], layout, like=returns)
        if self.scale_objective:
            square = advantages[actions.action_mask].square().mean()
            self.scale = float(objectives.objective_scale(self.all_gather(square).mean()))
        lengths = actions.action_mask.sum()
        self.mean_length = float(self.all_gather(lengths).float().mean()) / len(actions.rewards)
        self.policy_stopped = False
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
        value, advantage = self.target_critic(*inputs, features)
        q = objectives.dueling_q(value, advantage, log_pi)
        q = objectives.pessimistic_q(q, value, log_pi, self.floor)
        return Annotation(
            log_pi=log_pi,
            rebased_q=objectives.rebased_q(q, log_ref, log_pi, self.beta),
            q_taken=q.gather(-1, action_ids.unsqueeze(-1)).squeeze(-1),
            value=soft_bellman.soft_value(log_pi, log_ref, q, self.beta),
            kl=soft_bellman.kl_divergence(log_pi, log_ref),
            features=features,
        )

    def lambda_returns(
        self, actions: Actions, values: Tensor, q_taken: Tensor, rollout: Rollout
    ) -> Tensor:
        """G [B, L] of soft values [B, L] and Q of the taken tokens [B, L]."""
        mask = actions.action_mask
        last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
        rewards = torch.where(last, actions.rewards[:, None], 0.0)
        between = self.gamma * (~actions.terminated).float()
        discounts = torch.where(last, between[:, None], 1.0)
        ends = last & (actions.terminated | actions.truncated)[:, None]
        bootstrap = torch.zeros_like(actions.rewards)
        if len(rollout.bootstrap_ids):
            prompts = rollout.bootstrap_ids.to(self.device), rollout.bootstrap_mask.to(self.device)
            none_taken = torch.zeros_like(prompts[0][:, :1])
            bootstrap[actions.truncated] = self.evaluate_prefixes(*prompts, none_taken).value[:, 0]
        layout = episode_layout(mask, rollout.num_envs)
        following = torch.nn.functional.pad
        next_values = following(pack(values, layout)[:, 1:], (0, 1))
        ended = pack(ends, layout)
        next_values = torch.where(
            ended, pack(bootstrap[:, None].expand_as(values), layout), next_values
        )
        returns = soft_bellman.lambda_returns(
            pack(rewards, layout),
            pack(discounts, layout) * layout.valid,
            next_values,
            following(pack(q_taken, layout)[:, 1:], (0, 1)),
            self.lambda_,
            layout.valid & ~ended,
        )
        return unpack(returns, layout, like=values)

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        if batch_idx == 0:
            for name, value in self.rollout_metrics.items():
                self.log_mean(name, value, 1)
            self.log_mean("train/beta", self.beta, 1)
        loss = kl = torch.zeros((), device=self.device)
        for part in by_length(batch, LENGTH_GROUPS):
            share = len(part.weights) / len(batch.weights)
            loss = loss + share * self.critic_step(part)
            if not self.policy_stopped:
                policy_loss, part_kl = self.policy_step(part)
                loss, kl = loss + share * policy_loss, kl + share * part_kl
        if not self.policy_stopped:
            self.step_kls.append(kl)
        return loss

    def critic_step(self, batch: TokenBatch) -> Tensor:
        """Mean over action tokens of the critic's regression error."""
        inputs = batch.prompt_ids, batch.prompt_mask, batch.action_ids
        value, advantage = self.critic(*inputs, batch.features)
        q = objectives.dueling_q(value, advantage, batch.old_log_probs)
        q_taken = q.gather(-1, batch.action_ids.unsqueeze(-1)).squeeze(-1)
        losses = objectives.critic_loss(
            q_taken, batch.returns, batch.action_mask, self.critic_loss, self.huber_delta
        )
        loss = losses.sum() / (len(losses) * self.mean_length)
        self.log_mean("train/critic_loss", loss, len(losses))
        return loss

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

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes the policy's gradient away where the KL of the whole step leaves the trust region.

        No gradient, not a zero one: Adam's momentum would still move the policy.
        """
        kls, self.step_kls = self.step_kls, []
        if not kls or self.max_kl is None:
            return
        if self.all_gather(torch.stack(kls).mean()).mean() > self.max_kl:
            self.policy_stopped = True
            for parameter in self.backbone.policy_parameters():
                parameter.grad = None

    def on_train_epoch_end(self) -> None:
        polyak_update(self.target_critic, self.critic, self.tau)

    def validation_step(self, batch: Rollout, batch_idx: int) -> None:
        reward = batch.actions.rewards.mean()
        self.log("val/reward", reward, sync_dist=True, batch_size=len(batch.actions.rewards))

    def log_mean(self, name: str, value: Tensor | float, count: int) -> None:
        self.log(name, value, on_step=False, on_epoch=True, sync_dist=True, batch_size=count)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves out the frozen weights: they come from `model.name_or_path` again."""
        frozen = {
            f"backbone.{name}"
            for name, parameter in self.backbone.named_parameters(remove_duplicate=False)
            if not parameter.requires_grad
        }
        checkpoint["state_dict"] = {
            key: value for key, value in checkpoint["state_dict"].items() if key not in frozen
        }
