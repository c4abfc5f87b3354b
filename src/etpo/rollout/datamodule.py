"""LightningDataModule of rollouts; one epoch is one policy iteration."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader, IterableDataset

from etpo.environments.conversation import has_messages
from etpo.environments.text_env import TextVectorEnv
from etpo.errors import ConfigError, check_integer
from etpo.rollout.buffer import OnPolicyBuffer
from etpo.rollout.collector import OnProgress, collect
from etpo.rollout.replay import ReplayWindow
from etpo.rollout.types import Rollout
from etpo.sharding import full_parameters

PRECISIONS = ("32-true", "bf16-mixed")
OnTargetsComputed = Callable[[Rollout, Any], None]


def derived_seed(*keys: int) -> int:
    """Derive a 63-bit seed from `keys` (>= 0)."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> 1)


class RolloutDataModule(LightningDataModule):
    """Collect fresh actions from the current policy and serve them as minibatches.

    Random numbers of iteration i depend only on (seed, i, rank), so a resumed run draws the same
    numbers. If set, `on_targets_computed(rollout, batch)` is called once per iteration before the
    first update; `rollout` has the fresh actions, `batch`, the first output of `compute_targets`,
    the same ones and after them the replayed ones.

    Args:
        environment: `num_envs` copies of the task, per rank.
        actions_per_iteration: over all ranks; a multiple of ranks * num_envs and of
            ranks * minibatch_size.
        minibatch_size: actions per training step and rank.
        update_epochs: passes over the actions of an iteration.
        critic_epochs: passes that train the critic alone before these; then the targets are
            computed again with the new critic.
        max_new_tokens: length limit of an action.
        validation_steps: greedy actions per environment in a validation; 1 is enough if the first
            action ends an episode or is what counts.
        num_envs: number of environments per rank; None takes it from `environment`.
        seed: seed of sampling, minibatches and environment.
        pipeline_groups: number of groups of environments; the actions of one group are scored while
            the next group generates. More than 1 needs `environment.step_part`.
        replay_window: iterations whose actions are trained on; 1 for the fresh ones only.

    Raises:
        ConfigError: a value is out of range.
    """

    def __init__(
        self,
        environment: TextVectorEnv,
        *,
        actions_per_iteration: int = 16,
        minibatch_size: int = 16,
        update_epochs: int = 10,
        critic_epochs: int = 0,
        max_new_tokens: int = 64,
        validation_steps: int = 1,
        num_envs: int | None = None,
        seed: int = 0,
        pipeline_groups: int = 1,
        replay_window: int = 1,
    ) -> None:
        super().__init__()
        self.environment = environment
        self.actions_per_iteration = actions_per_iteration
        self.minibatch_size = minibatch_size
        self.update_epochs, self.critic_epochs = update_epochs, critic_epochs
        self.max_new_tokens = max_new_tokens
        self.validation_steps = validation_steps
        self.num_envs = environment.num_envs if num_envs is None else num_envs
        self.seed = seed
        self.pipeline_groups = pipeline_groups
        self.on_progress: OnProgress | None = None
        self.on_targets_computed: OnTargetsComputed | None = None
        self.rollout: Rollout | None = None
        self.policy_checked = False
        self.check_sizes(world_size=1)
        check_integer("replay.window", replay_window, 1)
        self.replay_window = replay_window
        self.replay = ReplayWindow(replay_window, self.num_envs)

    def check_sizes(self, world_size: int) -> None:
        """Raise ConfigError if the sizes do not fit together on `world_size` ranks."""
        check_integer("rollout.critic_epochs", self.critic_epochs, 0)
        sizes = ("num_envs", "minibatch_size", "update_epochs", "max_new_tokens")
        for key in ("actions_per_iteration", *sizes, "validation_steps"):
            check_integer(f"rollout.{key}", getattr(self, key), 1)
        if self.num_envs != self.environment.num_envs:
            raise ConfigError(
                f"rollout.num_envs={self.num_envs}: allowed is the environment's number, "
                f"{self.environment.num_envs}"
            )
        check_integer("rollout.pipeline_groups", self.pipeline_groups, 1, self.num_envs)
        unwrapped = getattr(self.environment, "unwrapped", self.environment)
        step_part = getattr(type(unwrapped), "step_part", TextVectorEnv.step_part)
        if self.pipeline_groups > 1 and step_part is TextVectorEnv.step_part:
            raise ConfigError(
                f"rollout.pipeline_groups={self.pipeline_groups}: allowed is 1, because "
                f"{self.environment.task_name} steps all environments together"
            )
        for key in ("num_envs", "minibatch_size"):
            unit = world_size * getattr(self, key)
            if self.actions_per_iteration % unit:
                raise ConfigError(
                    f"rollout.actions_per_iteration={self.actions_per_iteration}: allowed are "
                    f"multiples of {unit} (rollout.{key}={getattr(self, key)} on "
                    f"{world_size} process{'es' if world_size > 1 else ''})"
                )

    def setup(self, stage: str) -> None:
        trainer = self.attached_trainer
        self.check_sizes(trainer.world_size)
        batches, accumulated = self.batches_per_pass, trainer.accumulate_grad_batches
        if batches % accumulated:
            raise ConfigError(
                f"trainer.accumulate_grad_batches={accumulated}: allowed are divisors of "
                f"{batches}, the minibatches per process of one pass over the actions"
            )
        if trainer.precision not in PRECISIONS:
            raise ConfigError(
                f"trainer.precision={trainer.precision}: allowed are {', '.join(PRECISIONS)}, "
                "because log-probabilities are float32; model.dtype=bfloat16 stores weights in "
                "bfloat16"
            )
        if self.replay_window > 1 and not getattr(self.algorithm, "replays", False):
            raise ConfigError(
                f"replay.window={self.replay_window}: allowed with "
                f"{type(self.algorithm).__name__} is 1, because it trains on fresh actions only"
            )
        if self.critic_epochs > 0 and not getattr(self.algorithm, "fits_critic_first", False):
            raise ConfigError(
                f"rollout.critic_epochs={self.critic_epochs}: allowed is 0 unless the critic is "
                "cross-fitted (critic.cross_fit=true), because a critic that was fitted to an "
                "action biases the policy's gradient at that action"
            )
        policy = self.algorithm.policy
        if has_messages(self.environment):
            policy.prompt.check_conversations(policy.tokenizer)
        if policy.max_prompt_tokens + self.max_new_tokens > policy.context_size:
            raise ConfigError(
                f"rollout.max_new_tokens={self.max_new_tokens} and model.max_prompt_tokens="
                f"{policy.max_prompt_tokens}: allowed is a sum of at most {policy.context_size}, "
                "the context of the model"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the environment's state on rank zero and the replay window of every rank."""
        state = self.environment.state_dict()
        if self.replay_window == 1:
            return state
        windows: list[Any] = [self.replay.state_dict()]
        if self.attached_trainer.world_size > 1:
            windows = [None] * self.attached_trainer.world_size
            torch.distributed.all_gather_object(windows, self.replay.state_dict())
        return state | {"replay": windows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        windows = state_dict.pop("replay", [])
        self.environment.load_state_dict(state_dict)
        if len(windows) == self.attached_trainer.world_size:  # else it starts empty
            self.replay.load_state_dict(windows[self.attached_trainer.global_rank])

    @property
    def attached_trainer(self) -> Trainer:
        """The trainer; RuntimeError without one."""
        if self.trainer is None:
            raise RuntimeError("a RolloutDataModule needs a Trainer")
        return self.trainer

    @property
    def algorithm(self) -> Any:
        """The trained module, with `policy` and `compute_targets`."""
        return self.attached_trainer.lightning_module

    @property
    def actions_per_rank(self) -> int:
        return self.actions_per_iteration // self.attached_trainer.world_size

    @property
    def batches_per_pass(self) -> int:
        return self.actions_per_rank // self.minibatch_size

    def train_dataloader(self) -> DataLoader[Any]:
        buffer = OnPolicyBuffer(
            self.batches,
            self.shuffling_generator,
            self.batches_per_pass,
            self.minibatch_size,
            self.critic_epochs + self.update_epochs,
        )
        return DataLoader(buffer, batch_size=None)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(GreedyRollout(self), batch_size=None)

    def batches(self) -> Iterator[tuple[Any, int]]:
        """Yield the batches of an iteration and their passes: of the critic alone, then of both."""
        rollout, *batch = self.collect_targets()
        if self.critic_epochs > 0:
            states = batch[0].states
            yield batch.pop()._replace(critic_only=True), self.critic_epochs
            module, trainer = self.algorithm, self.attached_trainer
            module.update_target_critic(tau=1.0)
            with full_parameters(module), trainer.precision_plugin.forward_context():
                batch.append(module.compute_targets(rollout._replace(states=states)))
            del states
        del rollout
        yield batch.pop(), self.update_epochs  # no reference is kept

    def shuffling_generator(self) -> torch.Generator:
        """Return the generator that shuffles the minibatches of this iteration."""
        trainer = self.attached_trainer
        keys = self.seed, trainer.current_epoch, trainer.global_rank
        return torch.Generator().manual_seed(derived_seed(*keys, 2))

    def collect_targets(self) -> tuple[Rollout, Any]:
        """Collect a rollout of the current policy and compute its training batch.

        The rollout has the replayed actions too; `self.rollout` has the fresh ones.
        """
        module, trainer = self.algorithm, self.attached_trainer
        keys = self.seed, trainer.current_epoch, trainer.global_rank
        generator = torch.Generator(module.policy.device).manual_seed(derived_seed(*keys, 0))
        with full_parameters(module), trainer.precision_plugin.forward_context():
            self.rollout = collect(
                module.policy,
                self.environment,
                self.actions_per_rank // self.num_envs,
                self.max_new_tokens,
                generator,
                seed=derived_seed(*keys, 1),
                pipeline_groups=self.pipeline_groups,
                on_progress=self.on_progress,
            )
            if not self.policy_checked:
                module.check_rollout(self.rollout)
                self.policy_checked = True
            extended = self.replay.extended(self.rollout, module.policy.pad_id)
            batch = module.compute_targets(extended)
            if self.replay_window > 1:
                self.replay.append(self.rollout, batch.old_log_probs)
            if self.on_targets_computed is not None:
                self.on_targets_computed(self.rollout, batch)
        return extended, batch


class GreedyRollout(IterableDataset[Rollout]):
    """Validation data: `validation_steps` greedy actions in every environment."""

    def __init__(self, datamodule: RolloutDataModule) -> None:
        self.datamodule = datamodule

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Rollout]:
        data, trainer = self.datamodule, self.datamodule.attached_trainer
        policy = data.algorithm.policy
        keys = data.seed, trainer.current_epoch, trainer.global_rank, 3
        with full_parameters(data.algorithm), trainer.precision_plugin.forward_context():
            rollout = collect(
                policy,
                data.environment,
                data.validation_steps,
                data.max_new_tokens,
                None,
                seed=derived_seed(*keys),
            )
        yield rollout
