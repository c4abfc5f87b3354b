"""The environment as a LightningDataModule: every epoch is one policy iteration."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader, IterableDataset

from etpo.environments.text_env import TextVectorEnv
from etpo.errors import ConfigError, check_integer
from etpo.rollout.buffer import OnPolicyBuffer
from etpo.rollout.collector import OnProgress, collect
from etpo.rollout.types import Rollout
from etpo.sharding import gathered

PRECISIONS = ("32-true", "bf16-mixed")


def derived_seed(*keys: int) -> int:
    """A 63-bit seed that is a function of `keys` (>= 0) alone."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> 1)


OnTargetsComputed = Callable[[Rollout, Any], None]


class RolloutDataModule(LightningDataModule):
    """Collects fresh actions from the current policy and serves them as minibatches.

    The random numbers of iteration i depend on (seed, i, rank) only, so that a resumed run draws
    the same ones.

    environment: `num_envs` copies of the task, per rank.
    pipeline_groups: so many groups of environments take turns: while one's actions are answered, those of
    the next are generated. At most `num_envs`; more than 1 needs `environment.step_part`.
    actions_per_iteration: over all ranks; a multiple of ranks * num_envs and of
    ranks * minibatch_size.
    minibatch_size: actions per training step and rank.
    update_epochs: passes over each iteration's actions.
    max_new_tokens: length limit of an action.
    on_targets_computed(rollout, batch), if set, sees every iteration's rollout and what `compute_targets` made of
    it, both in the rollout's order, before the first update.
    Raises ConfigError for values out of range.
    """

    def __init__(
        self,
        environment: TextVectorEnv,
        *,
        actions_per_iteration: int,
        minibatch_size: int,
        update_epochs: int,
        max_new_tokens: int,
        num_envs: int,
        seed: int,
        pipeline_groups: int = 1,
    ) -> None:
        super().__init__()
        self.environment = environment
        self.actions_per_iteration = actions_per_iteration
        self.minibatch_size = minibatch_size
        self.update_epochs = update_epochs
        self.max_new_tokens = max_new_tokens
        self.num_envs = num_envs
        self.seed = seed
        self.pipeline_groups = pipeline_groups
        self.on_progress: OnProgress | None = None
        self.on_targets_computed: OnTargetsComputed | None = None
        self.rollout: Rollout | None = None
        self.checked = False  # whether what is sampled is what is trained
        self.check(world_size=1)

    def check(self, world_size: int) -> None:
        """Raises ConfigError where the sizes do not fit together on `world_size` ranks."""
        sizes = ("num_envs", "minibatch_size", "update_epochs", "max_new_tokens")
        for key in ("actions_per_iteration", *sizes):
            check_integer(f"rollout.{key}", getattr(self, key), 1)
        if self.num_envs != self.environment.num_envs:
            raise ConfigError(
                f"rollout.num_envs={self.num_envs}: allowed is the environment's number, "
                f"{self.environment.num_envs}"
            )
        check_integer("rollout.pipeline_groups", self.pipeline_groups, 1, self.num_envs)
        if self.pipeline_groups > 1 and type(self.environment).step_part is TextVectorEnv.step_part:
            raise ConfigError(
                f"rollout.pipeline_groups={self.pipeline_groups}: allowed is 1, for {self.environment.task_name} can "
                "only step all environments together"
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
        self.check(self.running.world_size)
        batches, joined = self.batches_per_pass, self.running.accumulate_grad_batches
        if batches % joined:
            raise ConfigError(
                f"trainer.accumulate_grad_batches={joined}: allowed are divisors of {batches}, a "
                "process's minibatches of one pass over the actions"
            )
        if self.running.precision not in PRECISIONS:
            raise ConfigError(
                f"trainer.precision={self.running.precision}: allowed are {', '.join(PRECISIONS)}, "
                "for log-probabilities are float32; model.dtype=bfloat16 gives weights in bfloat16"
            )
        policy = self.algorithm.policy
        used = policy.max_prompt_tokens + self.max_new_tokens
        if used > policy.context_size:
            raise ConfigError(
                f"rollout.max_new_tokens={self.max_new_tokens} and model.max_prompt_tokens="
                f"{policy.max_prompt_tokens}: allowed is a sum of at most "
                f"{policy.context_size}, the model's context"
            )

    def state_dict(self) -> dict[str, Any]:
        """What the environment wants kept in a checkpoint; of rank zero where there are several."""
        return self.environment.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.environment.load_state_dict(state_dict)

    @property
    def running(self) -> Trainer:
        """The trainer that this is attached to; RuntimeError where there is none."""
        if self.trainer is None:
            raise RuntimeError("a RolloutDataModule serves actions to a Trainer only")
        return self.trainer

    @property
    def algorithm(self) -> Any:
        """The algorithm that is trained: it has a `policy` and annotates what that did."""
        return self.running.lightning_module

    @property
    def actions_per_rank(self) -> int:
        return self.actions_per_iteration // self.running.world_size

    @property
    def batches_per_pass(self) -> int:
        return self.actions_per_rank // self.minibatch_size

    def train_dataloader(self) -> DataLoader[Any]:
        sizes = self.batches_per_pass, self.minibatch_size, self.update_epochs
        buffer = OnPolicyBuffer(self.fill, *sizes)
        return DataLoader(buffer, batch_size=None)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(GreedyEpisodes(self), batch_size=None)

    def fill(self) -> tuple[Any, torch.Generator]:
        """Rolls out the current policy and lets the algorithm compute_targets what came of it."""
        module, trainer = self.algorithm, self.running
        iteration, rank = trainer.current_epoch, trainer.global_rank
        device = module.policy.device
        decoding = torch.Generator(device).manual_seed(derived_seed(self.seed, iteration, rank, 0))
        with gathered(module), trainer.precision_plugin.forward_context():
            self.rollout = collect(
                module.policy,
                self.environment,
                self.actions_per_rank // self.num_envs,
                self.max_new_tokens,
                decoding,
                seed=derived_seed(self.seed, iteration, rank, 1),
                groups=self.pipeline_groups,
                on_progress=self.on_progress,
            )
            if not self.checked:
                module.check_rollout(self.rollout)
                self.checked = True
            batch = module.compute_targets(self.rollout)
            if self.on_targets_computed is not None:
                self.on_targets_computed(self.rollout, batch)
        shuffling = torch.Generator().manual_seed(derived_seed(self.seed, iteration, rank, 2))
        return batch, shuffling


class GreedyEpisodes(IterableDataset[Rollout]):
    """One greedy action in every environment: what validation sees of the current policy."""

    def __init__(self, datamodule: RolloutDataModule) -> None:
        self.datamodule = datamodule

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Rollout]:
        data = self.datamodule
        trainer = data.running
        with gathered(data.algorithm), trainer.precision_plugin.forward_context():
            rollout = collect(
                data.algorithm.policy,
                data.environment,
                1,
                data.max_new_tokens,
                None,
                seed=derived_seed(data.seed, trainer.current_epoch, trainer.global_rank, 3),
            )
        yield rollout
