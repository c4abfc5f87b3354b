"""What on-policy algorithms share: policy, optimizer, trust region, minibatches, checkpoints."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from etpo.algorithms.policy_check import check_policy
from etpo.errors import ConfigError, check_integer, check_range
from etpo.models.critics import copy_sharing_frozen
from etpo.models.policy import LanguageModelPolicy
from etpo.rollout.buffer import by_length
from etpo.rollout.types import Actions, Rollout
from etpo.sharding import ShardedStrategy

# A training step's actions are computed in so many groups of similar length: less padding.
LENGTH_GROUPS = 2
GROUPS = ("policy", "critic")  # of the optimizer's parameters; the second only with a critic
# features [..., D], tokens taken [...] -> log pi [..., V], log_kept [...]; as `head`
Head = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class TokenValues(NamedTuple):
    """What a critic says of prefixes and of the tokens that may follow; None where it is silent."""

    value: Tensor | None = None  # float32 [B, L], nan at prefixes that it is not fitted at
    q: Tensor | None = None  # float32 [B, L, V]


class OnPolicyAlgorithm(LightningModule):
    """A policy that is trained on fresh actions only; a subclass says with which losses.

    A subclass implements `compute_targets` and `policy_step`, sets `self.critic` and implements
    `critic_step` where it has one, and puts the numbers of a rollout into `self.rollout_metrics`.

    policy: builds policy and reference; called once all other values are checked.
    optimizer: builds an optimizer from parameter groups (policy first, then critic).
    scheduler: builds what sets its learning rates after every iteration, or None.
    beta: KL coefficient, >= 0; it moves linearly to beta_final_factor (>= 0) times that over
    beta_anneal_iters iterations. truncation_kl_coef: weight of KL(pi || softmax), the softmax's mass on tokens that
    `min_p` cut off, >= 0. policy_lr, critic_lr: learning rates, >= 0.
    max_kl: the policy stops for the rest of the iteration once the mean KL(pi_old || pi) of an
    action exceeds it, in nats; None for no limit. max_grad_norm: per parameter group.
    forward_batch_size: actions annotated at once. logits_chunk_size: tokens whose distributions over
    the vocabulary are held at once, >= 1; None: those of all, which is faster where it fits.
    Raises ConfigError for values out of range.
    """

    def __init__(
        self,
        policy: Callable[[], LanguageModelPolicy],
        optimizer: Callable[[list[dict[str, Any]]], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        *,
        beta: float,
        beta_final_factor: float,
        beta_anneal_iters: int,
        truncation_kl_coef: float,
        policy_lr: float,
        critic_lr: float = 0.0,
        max_kl: float | None,
        max_grad_norm: float,
        forward_batch_size: int,
        logits_chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        infinity = float("inf")
        for key, value in (
            ("beta", beta),
            ("beta_final_factor", beta_final_factor),
            ("truncation_kl_coef", truncation_kl_coef),
            ("policy_lr", policy_lr),
            ("critic_lr", critic_lr),
        ):
            check_range(f"algorithm.{key}", value, 0, infinity)
        check_range("algorithm.max_grad_norm", max_grad_norm, 0, infinity, above=True)
        if max_kl is not None:
            check_range("algorithm.max_kl", max_kl, 0, infinity, above=True)
        check_integer("algorithm.forward_batch_size", forward_batch_size, 1)
        check_integer("algorithm.beta_anneal_iters", beta_anneal_iters, 1)
        if logits_chunk_size is not None:
            check_integer("algorithm.logits_chunk_size", logits_chunk_size, 1)
        self.policy = policy()
        self.logits_chunk_size = logits_chunk_size
        self.critic: nn.Module | None = None
        self.optimizer, self.scheduler = optimizer, scheduler
        self.first_beta, self.last_beta = beta, beta * beta_final_factor
        self.beta_anneal_iters, self.truncation_kl_coef = beta_anneal_iters, truncation_kl_coef
        self.policy_lr, self.critic_lr, self.max_kl = policy_lr, critic_lr, max_kl
        self.max_grad_norm, self.forward_batch_size = max_grad_norm, forward_batch_size
        self.strict_loading = False
        self.policy_stopped = False
        self.step_kls: list[Tensor] = []
        self.rollout_metrics: dict[str, float] = {}
        self.old_head: Head = self.policy.head

    @property
    def beta(self) -> float:
        """The KL coefficient of this iteration."""
        return self.moved(self.first_beta, self.last_beta, self.beta_anneal_iters)

    def moved(self, first: float, last: float, iters: int) -> float:
        """Where a value is in this iteration that goes linearly from `first` to `last`."""
        return first + (last - first) * min(self.current_epoch / iters, 1.0)

    def hold_old_head(self) -> None:
        """Has `old_head` stay the policy's head of now, pi_old's, while its output layer moves."""
        # parameters that are not trained are not copied; no submodule, so that no checkpoint has it
        layer = copy_sharing_frozen(self.policy.output_layer).requires_grad_(False)
        self.old_head = functools.partial(self.policy.head, layer=layer)

    def read_by_policy(self, actions: Actions) -> tuple[Tensor, ...]:
        """Prompts, masks and actions, and the features that the tokens were drawn from.

        Without the last where bfloat16 rounds them otherwise than a training step's forward would:
        KL(pi_old || pi) and the probability ratios would start at noise.
        """
        inputs = actions.prompt_ids, actions.prompt_mask, actions.action_ids
        rounded = torch.is_autocast_enabled(self.device.type)
        if rounded or actions.features.dtype != torch.float32:
            return inputs
        return *inputs, actions.features

    def in_slices(self, evaluate: Callable[..., NamedTuple], *inputs: Tensor) -> Any:
        """`evaluate` of inputs [B, ...], `forward_batch_size` rows at a time.

        It returns a NamedTuple of tensors whose first dimension is the row; so does this.
        """
        slices = zip(*(torch.split(each, self.forward_batch_size) for each in inputs), strict=True)
        parts: list[Any] = [evaluate(*part) for part in slices]
        kind, columns = type(parts[0]), list(zip(*parts, strict=True))
        del parts  # so that a joined field's parts are freed before the next is joined
        return kind(*(torch.cat(columns.pop(0)) for _ in range(len(columns))))

    def at_next_prompts(self, evaluate: Callable[..., NamedTuple], rollout: Rollout) -> Any:
        """`evaluate` in slices, at the true next prompts of truncated actions.

        Token 0 counts as taken there, so that `min_p` never cuts it off; with its probability below
        `min_p` of the likeliest token's that moves V by less than min_p |Q(0) - V|.
        """
        prompts = rollout.bootstrap_ids.to(self.device), rollout.bootstrap_mask.to(self.device)
        return self.in_slices(evaluate, *prompts, torch.zeros_like(prompts[0][:, :1]))

    def annotated_width(self) -> int:
        """Floats that an annotated token takes until the iteration's last training step."""
        return 2 * int(self.policy.hidden_size)  # sampled ones and the reference's

    def check_rollout(self, rollout: Rollout) -> None:
        """Raises ConfigError where a run's first rollout is not of the policy that is trained."""
        sizes = self.forward_batch_size, self.logits_chunk_size
        fresh = self.trainer.global_step == 0
        check_policy(self, self.policy, rollout.actions, *sizes, fresh=fresh)

    def compute_targets(self, rollout: Rollout) -> Any:
        """A NamedTuple of tensors whose first dimension is the action, without gradient.

        The policy is still the one that the rollout was sampled with.
        """
        raise NotImplementedError

    def token_values(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        action_ids: Tensor,
        features: Tensor,
        log_pi: Tensor,
        log_ref: Tensor,
    ) -> TokenValues:
        """V and Q as the policy objective uses them, at the L prefixes of action_ids [B, L].

        `features` [B, L, D] and `log_ref` [B, L, V] are the reference's, `log_pi` the policy's.
        """
        return TokenValues()

    def sampled_advantages(self, batch: Any) -> Tensor | None:
        """What the objective multiplies the taken tokens' probability ratio with: [B, L].

        `batch` is what `compute_targets` returned. None where no such term exists.
        """
        return None

    def policy_step(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Means over actions of the policy's loss and of KL(pi_old || pi) in nats."""
        raise NotImplementedError

    def critic_step(self, batch: Any) -> Tensor:
        """Mean over actions of the critic's loss."""
        return torch.zeros((), device=self.device)

    def configure_model(self) -> None:
        """Shards the language models and the critics, where the trainer's strategy does.

        Raises ConfigError for what the strategy cannot train.
        """
        strategy = self.trainer.strategy
        if isinstance(strategy, ShardedStrategy):
            parts = [*self.children(), *self.policy.children()]
            strategy.shard(*(part for part in parts if part is not self.policy))
            if self.logits_chunk_size is not None:
                raise ConfigError(
                    f"algorithm.logits_chunk_size={self.logits_chunk_size}: allowed with "
                    "trainer=fsdp is null, for a model is gathered as a whole"
                )
        if isinstance(strategy, DeepSpeedStrategy) and self.trainer.precision != "32-true":
            raise ConfigError(
                f"trainer.precision={self.trainer.precision}: allowed with trainer=deepspeed is "
                "32-true, for DeepSpeed would round the buffer"
            )
        if isinstance(strategy, DeepSpeedStrategy) and self.max_kl is not None:
            raise ConfigError(
                f"algorithm.max_kl={self.max_kl}: allowed with trainer=deepspeed is null, for "
                "DeepSpeed holds the gradients that the trust region would take away"
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        groups = [{"params": self.policy.trainable_parameters(), "lr": self.policy_lr}]
        if self.critic is not None:
            trained = [p for p in self.critic.parameters() if p.requires_grad]
            groups.append({"params": trained, "lr": self.critic_lr})
        try:
            optimizer = self.optimizer(groups)
            if self.scheduler is None:
                return {"optimizer": optimizer}
            return {"optimizer": optimizer, "lr_scheduler": self.scheduler(optimizer)}
        except (TypeError, ValueError) as error:
            raise ConfigError(f"algorithm.optimizer, algorithm.scheduler: {error}") from error

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Limits the gradient norm of each list of `clipped_together`; logs it as it was before.

        Raises ConfigError for one that is not finite, before the optimizer's step.
        """
        for name, parameters in self.clipped_together(optimizer).items():
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            if not torch.isfinite(norm):
                raise ConfigError(
                    "algorithm.policy_lr, algorithm.critic_lr: the gradient norm is "
                    f"{float(norm)} in iteration {self.current_epoch + 1}; allowed are finite "
                    "gradients. The step was not taken, and last.ckpt is of the iteration before. "
                    "Smaller learning rates or model.dtype=float32 may help"
                )
            if any(parameter.grad is not None for parameter in parameters):
                self.log_mean(f"train/grad_norm/{name}", norm, 1)

    def clipped_together(self, optimizer: Optimizer) -> dict[str, list[nn.Parameter]]:
        """Parameters with a common limit on their gradient norm: the policy's, the critic's."""
        groups = zip(GROUPS, optimizer.param_groups, strict=False)
        return {name: group["params"] for name, group in groups}

    def on_fit_start(self) -> None:
        """Raises ConfigError for a model that cannot be computed in chunks."""
        if self.logits_chunk_size is not None:
            self.policy.check_output_layer(f"algorithm.logits_chunk_size={self.logits_chunk_size}")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the learning rates to the present configuration: `on_train_start` sets them."""
        checkpoint["lr_schedulers"] = []

    def on_train_start(self) -> None:
        """Has the options of a resumed run's optimizer and scheduler act, not the checkpoint's.

        The scheduler makes the steps of the iterations so far again, which gives the same learning
        rates to the last bit where nothing has changed.
        """
        if not (self.trainer.ckpt_path and self.trainer.current_epoch):
            return
        configured: Any = self.configure_optimizers()
        fresh, scheduler = configured["optimizer"], configured.get("lr_scheduler")
        if scheduler is not None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                for _ in range(self.trainer.current_epoch):
                    scheduler.step()
            for config in self.trainer.lr_scheduler_configs:
                config.scheduler.load_state_dict(scheduler.state_dict())
        for optimizer in self.trainer.optimizers:
            for group, options in zip(optimizer.param_groups, fresh.param_groups, strict=True):
                group |= {key: value for key, value in options.items() if key != "params"}

    def on_train_epoch_start(self) -> None:
        self.policy_stopped = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 0:
            for name, value in self.rollout_metrics.items():
                self.log_mean(name, value, 1)
            self.log_mean("train/beta", self.beta, 1)
            groups = self.trainer.optimizers[0].param_groups
            for name, group in zip(GROUPS, groups, strict=False):
                self.log_mean(f"train/lr/{name}", group["lr"], 1)
        loss = kl = torch.zeros((), device=self.device)
        for part in by_length(batch, LENGTH_GROUPS):
            share = len(part.weights) / len(batch.weights)
            loss = loss + share * self.critic_step(part)
            if not self.policy_stopped:
                policy_loss, part_kl = self.policy_step(part)
                loss, kl = loss + share * policy_loss, kl + share * part_kl
        if not self.policy_stopped:
            self.step_kls.append(kl)
        elif self.critic is None:  # backward needs a graph; the gradient is taken away below
            loss = 0.0 * self.policy.trainable_parameters()[0].sum()
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Takes the policy's gradient away where the KL of the whole step leaves the trust region.

        No gradient, not a zero one: Adam's momentum would still move the policy.
        """
        kls, self.step_kls = self.step_kls, []
        if kls and self.max_kl is not None:
            step_kl = self.mean_over_ranks(torch.stack(kls).mean())
            self.policy_stopped = bool(step_kl > self.max_kl)
        if self.policy_stopped:
            for parameter in self.policy.trainable_parameters():
                parameter.grad = None

    def validation_step(self, batch: Rollout, batch_idx: int) -> None:
        reward = batch.actions.rewards.mean()
        self.log("val/reward", reward, sync_dist=True, batch_size=len(batch.actions.rewards))

    def mean_over_ranks(self, value: Tensor) -> Tensor:
        """The mean of every process's `value` []: []."""
        gathered: Any = self.all_gather(value.float())
        mean: Tensor = gathered.mean()
        return mean

    def mean_over_tokens(self, values: Tensor, mask: Tensor) -> Tensor:
        """The mean of `values` [B, L] over what `mask` [B, L] marks, in all processes: []."""
        return self.mean_over_ranks(values[mask].sum()) / self.mean_over_ranks(mask.sum())

    def log_clip_fraction(self, clipped: Tensor, mask: Tensor) -> None:
        """Logs the fraction of what `mask` marks that is `clipped`: [B, K] each."""
        count = int(mask.sum())
        self.log_mean("train/clip_fraction", (clipped * mask).sum() / count, count)

    def of_all_ranks(self, rows: Tensor) -> Tensor:
        """Every process's `rows` [N, K], padded with 0 to the widest: [ranks * N, K], by rank."""
        widths: Any = self.all_gather(torch.tensor(rows.shape[1], device=rows.device))
        width = int(widths.max())
        gathered: Any = self.all_gather(nn.functional.pad(rows, (0, width - rows.shape[1])))
        joined: Tensor = gathered.reshape(-1, width)
        return joined

    def log_mean(self, name: str, value: Tensor | float, count: int) -> None:
        self.log(name, value, on_step=False, on_epoch=True, sync_dist=True, batch_size=count)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves out what need not be kept, and keeps the same weights once.

        NoUpdate weights come from `model.name_or_path` again. A checkpoint of weights alone, which
        serves `etpo-evaluate` and `etpo-export`, holds the policy's.
        """
        frozen = {id(p) for p in self.policy.parameters() if not p.requires_grad}
        left_out = {
            name for name, p in self.named_parameters(remove_duplicate=False) if id(p) in frozen
        }
        if "optimizer_states" not in checkpoint:
            left_out |= {n for n in checkpoint["state_dict"] if not n.startswith("policy.")}
        state = {n: w for n, w in checkpoint["state_dict"].items() if n not in left_out}
        for name, weight in state.items():  # after a Polyak step of 1 the target is the critic
            other = state.get(name.removeprefix("target_"))
            if other is not None and other is not weight and torch.equal(other, weight):
                state[name] = other
        checkpoint["state_dict"] = state
