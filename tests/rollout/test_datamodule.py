import weakref
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from etpo.environments.text_env import TextVectorEnv
from etpo.errors import ConfigError
from etpo.rollout.buffer import OnPolicyBuffer
from etpo.rollout.datamodule import RolloutDataModule, derived_seed

SIZES = {
    "actions_per_iteration": 32,
    "minibatch_size": 8,
    "update_epochs": 2,
    "max_new_tokens": 4,
    "num_envs": 4,
    "seed": 0,
}


class Batch(NamedTuple):
    row: torch.Tensor
    double: torch.Tensor

    def select(self, rows):
        return Batch(self.row[rows], self.double[rows])


def test_buffer_serves_every_action_once_per_epoch_and_refills():
    fills = []

    def fill():
        fills.append(len(fills))
        rows = torch.arange(6) + 10 * len(fills)
        yield Batch(rows, 2 * rows), 2

    buffer = OnPolicyBuffer(fill, torch.Generator, batches_per_epoch=2, minibatch_size=3, epochs=2)
    for iteration in (1, 2):
        batches = list(buffer)
        assert len(batches) == len(buffer) == 4
        for epoch in (batches[:2], batches[2:]):
            rows = torch.cat([b.row for b in epoch])
            assert sorted(rows.tolist()) == [10 * iteration + i for i in range(6)]
        assert all(torch.equal(b.double, 2 * b.row) for b in batches)
    assert len(fills) == 2


def test_the_actions_of_an_iteration_are_freed_with_the_last_minibatch():
    filled = []

    def fill():
        batch = Batch(torch.arange(6), torch.zeros(6))
        filled.append(weakref.ref(batch.double))
        held = [batch]
        del batch
        yield held.pop(), 1

    buffer = OnPolicyBuffer(fill, torch.Generator, batches_per_epoch=2, minibatch_size=3, epochs=1)
    minibatches = iter(buffer)
    next(minibatches)
    assert filled[0]() is not None
    next(minibatches)
    assert filled[0]() is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_envs": 5}, "actions_per_iteration=32: allowed .* multiples of 5"),
        ({"minibatch_size": 7}, "actions_per_iteration=32: allowed .* multiples of 7"),
        ({"minibatch_size": 0}, "minibatch_size=0: allowed .*1 or more"),
        ({"update_epochs": -1}, "update_epochs=-1: allowed .*1 or more"),
        ({"max_new_tokens": 1.5}, "max_new_tokens=1.5: allowed .*1 or more"),
        ({"pipeline_groups": 5}, "pipeline_groups=5: allowed .*from 1 to 4"),
    ],
)
def test_impossible_sizes_are_config_errors(letter_env, changes, message):
    with pytest.raises(ConfigError, match=rf"^rollout\.{message}"):
        RolloutDataModule(letter_env(changes.get("num_envs", 4)), **(SIZES | changes))


def test_groups_need_an_environment_that_can_step_in_parts(letter_env):
    class Together(letter_env):
        step_part = TextVectorEnv.step_part

    RolloutDataModule(letter_env(4), **SIZES, pipeline_groups=2)
    with pytest.raises(ConfigError, match="pipeline_groups=2: allowed is 1, .*letters"):
        RolloutDataModule(Together(4), **SIZES, pipeline_groups=2)


def test_sizes_must_fit_all_processes(letter_env):
    data = RolloutDataModule(letter_env(4), **SIZES)
    data.check_sizes(world_size=4)
    with pytest.raises(ConfigError, match="multiples of 64 .*8 processes"):
        RolloutDataModule(letter_env(8), **(SIZES | {"num_envs": 8})).check_sizes(world_size=8)


def test_steps_end_with_a_pass(letter_env):
    data = RolloutDataModule(letter_env(4), **SIZES)
    data.trainer = SimpleNamespace(world_size=2, accumulate_grad_batches=4)
    with pytest.raises(ConfigError, match="accumulate_grad_batches=4: allowed are divisors of 2"):
        data.setup("fit")


def test_derived_seeds_differ_and_repeat():
    seeds = [
        derived_seed(s, i, r, k) for s in range(3) for i in range(3) for r in (0, 1) for k in (0, 1)
    ]
    assert len(set(seeds)) == len(seeds)
    assert derived_seed(0, 1, 2, 3) == derived_seed(0, 1, 2, 3)
    assert all(0 <= s < 2**63 for s in seeds)


def test_the_number_of_environments_must_be_the_configured_one(letter_env):
    with pytest.raises(ConfigError, match="num_envs=4: allowed .*environment.* 2$"):
        RolloutDataModule(letter_env(2), **SIZES)
