"""Base class of the trained algorithms: optimizer, trust region, minibatches, checkpoints."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from etpo.algorithms import evaluation
from etpo.algorithms.optimization import apply_configured_options, clip_gradients, trained_state
from etpo.algorithms.policy_check import check_policy
from etpo.algorithms.settings import Settings, build_settings
from etpo.errors import ConfigError
from etpo.models import critics
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prefix_tree import PrefixTree
from etpo.models.token_columns import TokenColumns
from etpo.rollout.metrics import first_episode_reward
from etpo.rollout.types import Actions, Decisions, PrefixStates, Rollout, TokenBatch
from etpo.sharding import configure_strategy

PARAMETER_GROUPS = ("policy", "critic")
Metrics = dict[str, tuple[Tensor | float, int]]  # mean and its number of samples


class OnPolicyAlgorithm(LightningModule):
    """Train a policy on the actions of the current iteration, and of earlier ones if it `replays`.

    A subclass implements `compute_targets` and `policy_loss`, and `critic_loss` if it has a critic.
    Loss methods return a scalar loss and its metrics; this class adds the losses, logs the metrics
    and steps the optimizer.

    Args:
        policy: policy and reference.
        critic: built for `policy`, or None.
        settings: an instance of `settings_class`; None uses its defaults.
        optimizer: builds an optimizer from parameter groups (policy, critic). Default: AdamW.
        scheduler: builds a learning rate scheduler that steps once per iteration. Default: none.
    """

    settings_class: ClassVar[type[Settings]] = Settings
    critic_head: ClassVar[type[nn.Module] | None] = None  # head that `from_config` gives the critic
    has_target_critic: ClassVar[bool] = False  # a Polyak average of the critic, with `settings.tau`
    replays: ClassVar[bool] = False  # trains on actions of earlier iterations too
    cross_fits: ClassVar[bool] = False  # evaluates actions with the other fold's head
    settings: Any
    target_critic: Any

    def __init__(
        self,
        policy: LanguageModelPolicy,
        critic: critics.Critic | None = None,
        settings: Settings | None = None,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer] | None = None,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    ) -> None:
        super().__init__()
        self.policy, self.critic = policy, critic
        if critic is not None and self.has_target_critic:
            self.target_critic = critics.make_target_network(critic)
        self.settings = self.settings_class() if settings is None else settings
        # eps 1e-5 shrinks Adam's steps when gradients vanish
        self.optimizer = optimizer or functools.partial(AdamW, eps=1e-5, weight_decay=0.0)
        self.scheduler = scheduler
        self.strict_loading = self.kl_stopped = False
        self.step_kls: list[Tensor] = []
        self.iteration_metrics: dict[str, float] = {}
        self.mean_length = 1.0  # tokens per action in this iteration
        self.old_lm_head: nn.Module | None = None

    @classmethod
    def from_config(
        cls,
        policy: Callable[[], LanguageModelPolicy],
        critic: Callable[..., critics.Critic] | None = None,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer] | None = None,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        **settings: Any,
    ) -> Self:
        """Check the settings, then build policy, critic and algorithm.

        Raises:
            ConfigError: a setting is unknown or out of range, or the critic does not fit.
        """
        checked = build_settings(cls.settings_class, settings)
        if critic is None and cls.critic_head is not None:
            raise ConfigError("critic=null: allowed is a critic, which this algorithm needs")
        model = policy()
        built = None if critic is None else critic(model, head=cls.critic_head)
        if built is not None and built.cross_fit and not cls.cross_fits:
            raise ConfigError(f"critic.cross_fit=true: allowed with {cls.__name__} is false")
        return cls(model, built, checked, optimizer, scheduler)

    @property
    def beta(self) -> float:
        """KL coefficient of this iteration."""
        s = self.settings
        return self.annealed(s.beta, s.beta * s.beta_final_factor, s.beta_anneal_iters)

    def annealed(self, first: float, last: float, iters: int) -> float:
        """Interpolate linearly from `first` to `last` over `iters` iterations."""
        return first + (last - first) * min(self.current_epoch / iters, 1.0)

    def compute_targets(self, rollout: Rollout) -> TokenBatch:
        """Build the training batch of an iteration and set `iteration_metrics`.

        Called before the policy's first update, when it equals the policy that sampled the fresh
        actions of `rollout`. All quantities "old" are of this policy, for replayed actions too.
        """
        raise NotImplementedError

    def start_iteration(self, rollout: Rollout) -> tuple[Actions, evaluation.TokenEvaluation]:
        """Move the actions to the device, snapshot the LM head and evaluate the taken tokens."""
        actions = Actions(*(x.to(self.device) for x in rollout.actions))
        # copies trained parameters only; not a submodule, so checkpoints do not contain it
        object.__setattr__(self, "old_lm_head", critics.snapshot(self.policy.lm_head))
        tree = actions.tree(self.folds(rollout))
        self.mean_length = float(self.mean_over_ranks(actions.step_mask.float().sum(1).mean()))
        states = rollout.states
        if states is None:
            states = self.prefix_states(tree, *self.recorded_states(rollout, actions, tree))
        return actions, self.evaluate(tree, states)

    def recorded_states(
        self, rollout: Rollout, actions: Actions, tree: PrefixTree
    ) -> tuple[Tensor | None, ...]:
        """Return action space, support and hidden states as far as the sampler's are valid."""
        hidden, allowed, support = (
            x.flatten(0, 1)[tree.first]
            for x in (actions.hidden_states, actions.allowed, actions.support)
        )
        if rollout.replayed_log_mu is not None:
            return allowed, None, None
        # recompute in bfloat16: rounding of generation and training differs, ratios would not be 1
        autocast = torch.is_autocast_enabled(self.device.type)
        recorded = actions.hidden_states.dtype == torch.float32 and not autocast
        return allowed, support, hidden if recorded else None

    @property
    def fits_critic_first(self) -> bool:
        """True if the critic may be fitted to the actions before the policy."""
        return self.critic is not None and self.critic.cross_fit

    def folds(self, rollout: Rollout) -> Tensor | None:
        """Return the half of the environments of each action if the critic is cross-fitted: [B]."""
        if self.critic is None or not self.critic.cross_fit:
            return None
        if rollout.num_envs < 2:
            raise ConfigError(
                "critic.cross_fit=true: allowed with rollout.num_envs of 2 or more, whose halves "
                "train one head each"
            )
        rows = torch.arange(len(rollout.actions.rewards), device=self.device)
        return rows % rollout.num_envs % 2

    def replay_ratios(self, rollout: Rollout, old: evaluation.TokenEvaluation) -> Tensor:
        """Compute pi_old/mu of the taken tokens, 1 for fresh actions: [B, L].

        mu is the policy that sampled the action.
        """
        ratios = torch.ones_like(old.log_pi)
        if rollout.replayed_log_mu is not None:
            fresh = rollout.num_fresh
            log_mu = rollout.replayed_log_mu.to(self.device)
            ratios[fresh:] = (old.log_pi[fresh:] - log_mu).exp()
        return ratios

    def replay_metrics(self, rollout: Rollout, ratios: Tensor, mask: Tensor) -> dict[str, float]:
        """Return the mean of min(1, pi_old/mu) over the replayed steps; ratios, mask: [B, K]."""
        if rollout.replayed_log_mu is None:
            return {}
        replayed = slice(rollout.num_fresh, None)
        truncated = ratios[replayed].clamp(max=1)
        return {"rollout/replay_ratio": float(self.mean_over_tokens(truncated, mask[replayed]))}

    def evaluate(self, tree: PrefixTree, states: PrefixStates) -> evaluation.TokenEvaluation:
        """Evaluate policy, reference and critic at the taken tokens."""
        size = self.settings.logits_chunk_size
        taken = evaluation.evaluate_tokens(self.policy, tree, states, size)
        if self.critic is None:
            return taken
        values = self.prefix_values(tree, states)
        return taken._replace(value=tree.of_tokens(values))

    def prefix_states(
        self, tree: PrefixTree, *recorded: Tensor | None, keep_taken: bool = True
    ) -> PrefixStates:
        """Compute what is not recorded.

        recorded: action space, support and hidden states, as for `evaluation.prefix_states`.
        """
        size = self.settings.logits_chunk_size
        return evaluation.prefix_states(self.policy, tree, size, *recorded, keep_taken=keep_taken)

    def prefix_values(self, tree: PrefixTree, states: PrefixStates) -> Tensor:
        """Return the critic's values [N] of the prefixes."""
        assert self.critic is not None
        return torch.as_tensor(self.critic(tree, states.ref, states.old))

    def bootstrap_values(self, rollout: Rollout) -> Tensor:
        """Return the value of the true next prompt of truncated actions, 0 for others: [B]."""
        values = torch.zeros_like(rollout.actions.rewards, device=self.device)
        if rollout.bootstrap is not None:
            following = Decisions(*(x.to(self.device) for x in rollout.bootstrap))
            truncated, fold = rollout.actions.truncated.to(self.device), self.folds(rollout)
            tree = following.tree(None if fold is None else fold[truncated])
            allowed = following.allowed.flatten(0, 1)[tree.first]
            states = self.prefix_states(tree, allowed, keep_taken=False)  # they are placeholders
            after = self.evaluate(tree, states)
            values[truncated] = after.value.sum(1)
        return values

    def check_rollout(self, rollout: Rollout) -> None:
        """Raise ConfigError if the first rollout was not sampled from the trained policy."""
        check_policy(self, rollout.actions, fresh=self.trainer.global_step == 0)

    def policy_loss(self, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """Return the mean loss over actions, and metrics with `train/kl_to_old` in nats."""
        raise NotImplementedError

    def critic_loss(self, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """Return the mean loss over actions and its metrics."""
        return torch.zeros((), device=self.device), {}

    def taken_log_probs(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Compute log pi of the taken tokens and the log mass of the support: [B, L] each."""
        s = self.settings
        with_mass = s.truncation_kl_coef > 0
        return evaluation.taken_log_probs(self.policy, batch, s.logits_chunk_size, with_mass)

    def loss_values(
        self,
        tree: PrefixTree,
        states: PrefixStates,
        columns: TokenColumns,
        log_pi: Tensor,
        log_ref: Tensor,
    ) -> evaluation.PrefixValues:
        """Return V [N] and Q [N, U] of the policy loss; log_pi, log_ref: [N, U] of the columns."""
        return evaluation.PrefixValues()

    def sampled_advantages(self, batch: TokenBatch) -> Tensor | None:
        """Return the factor [B, L] of the probability ratio in the loss, None if there is none."""
        return batch.advantages

    def configure_model(self) -> None:
        configure_strategy(self)

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.policy.trainable_parameters(), "lr": self.settings.policy_lr}]
        if self.critic is not None:
            trained = [p for p in self.critic.parameters() if p.requires_grad]
            groups.append({"params": trained, "lr": self.settings.critic_lr})
        try:
            optimizer = self.optimizer(groups)
            if self.scheduler is None:
                return {"optimizer": optimizer}
            return {"optimizer": optimizer, "lr_scheduler": self.scheduler(optimizer)}
        except (TypeError, ValueError) as error:
            raise ConfigError(f"algorithm.optimizer, algorithm.scheduler: {error}") from error

    def on_train_start(self) -> None:
        if self.trainer.ckpt_path and self.trainer.current_epoch:
            apply_configured_options(self.trainer, self.configure_optimizers())

    def on_train_epoch_start(self) -> None:
        self.kl_stopped = self.current_epoch < getattr(self.settings, "critic_warmup_iters", 0)

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        if batch_idx == 0:
            self.log_iteration()
        loss, metrics = self.critic_loss(batch)
        if not (self.kl_stopped or batch.critic_only):
            policy_loss, policy_metrics = self.policy_loss(batch)
            loss, metrics = loss + policy_loss, metrics | policy_metrics
            self.step_kls.append(torch.as_tensor(policy_metrics["train/kl_to_old"][0]))
        self.log_metrics(metrics)
        # backward needs a graph; the gradient is removed below
        if self.kl_stopped and self.critic is None:
            loss = 0.0 * self.policy.trainable_parameters()[0].sum()
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Remove the policy's gradient if the KL of the step exceeds the trust region.

        The gradient becomes None: with zeros Adam's momentum would still move the policy.
        """
        kls, self.step_kls = self.step_kls, []
        if kls and self.settings.max_kl is not None:
            step_kl = self.mean_over_ranks(torch.stack(kls).mean())
            self.kl_stopped = bool(step_kl > self.settings.max_kl)
        self.log_metrics({"train/kl_stopped": (float(self.kl_stopped), 1)})
        if self.kl_stopped:
            for parameter in self.policy.trainable_parameters():
                parameter.grad = None

    def configure_gradient_clipping(self, optimizer: Optimizer, *_: Any, **__: Any) -> None:
        """Clip the gradient norms of policy and critic and log them before clipping."""
        iteration = self.current_epoch + 1
        for name, group in zip(PARAMETER_GROUPS, optimizer.param_groups, strict=False):
            norm = clip_gradients(group["params"], self.settings.max_grad_norm, iteration)
            if any(parameter.grad is not None for parameter in group["params"]):
                self.log_metrics({f"train/grad_norm/{name}": (norm, 1)})

    def on_train_epoch_end(self) -> None:
        self.update_target_critic()

    def update_target_critic(self, tau: float | None = None) -> None:
        """Move the target critic, if there is one, by a Polyak step; None: `settings.tau`."""
        if self.critic is not None and self.has_target_critic:
            step = self.settings.tau if tau is None else tau
            critics.polyak_update(self.target_critic, self.critic, step)

    def validation_step(self, batch: Rollout, batch_idx: int) -> None:
        reward = first_episode_reward(batch)
        self.log("val/reward", reward, sync_dist=True, batch_size=batch.num_envs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["lr_schedulers"] = []  # `on_train_start` sets the learning rates

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = trained_state(self, checkpoint)
        if "optimizer_states" not in checkpoint:  # nothing to resume
            checkpoint.get("RolloutDataModule", {}).pop("replay", None)

    def log_iteration(self) -> None:
        """Log the metrics of the rollout and the scheduled values."""
        rates = self.trainer.optimizers[0].param_groups
        values = self.iteration_metrics | {"train/beta": self.beta}
        for name, group in zip(PARAMETER_GROUPS, rates, strict=False):
            values[f"train/lr/{name}"] = group["lr"]
        self.log_metrics({name: (value, 1) for name, value in values.items()})

    def log_metrics(self, metrics: Metrics) -> None:
        """Log means over the iteration and the ranks, weighted by the number of samples."""
        for name, (value, count) in metrics.items():
            self.log(name, value, on_step=False, on_epoch=True, sync_dist=True, batch_size=count)

    def mean_over_ranks(self, value: Tensor) -> Tensor:
        """Average a scalar over all ranks: [] -> []."""
        return torch.as_tensor(self.all_gather(value.float())).mean()

    def mean_over_tokens(self, values: Tensor, mask: Tensor) -> Tensor:
        """Average `values` [B, L] where `mask` [B, L] is true, over all ranks: []."""
        return self.mean_over_ranks(values[mask].sum()) / self.mean_over_ranks(mask.sum())
