"""Runs algorithms in small environments."""

import numpy as np
import pytest
from lightning import Trainer

from etpo.rollout.datamodule import RolloutDataModule


@pytest.fixture
def fit(tmp_path):
    """fit(module, env, iterations): trains and returns the data module."""

    def run(module, env, iterations, callbacks=(), **sizes):
        data = RolloutDataModule(
            env,
            **{
                "actions_per_iteration": 8 * env.num_envs,
                "minibatch_size": 16,
                "update_epochs": 4,
                "max_new_tokens": 5,
                "num_envs": env.num_envs,
                "seed": 0,
            }
            | sizes,
        )
        trainer = Trainer(
            max_epochs=iterations,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            callbacks=list(callbacks),
            default_root_dir=tmp_path,
        )
        trainer.fit(module, data)
        return data

    return run


class Paid:
    """An environment whose rewards are `reward(action)`."""

    def __init__(self, env, reward):
        self.env, self.reward = env, reward
        self.num_envs = env.num_envs
        self.reset = env.reset

    def step(self, actions):
        observations, _, *rest = self.env.step(actions)
        return observations, np.array([float(self.reward(a)) for a in actions]), *rest


@pytest.fixture
def paid():
    """paid(env, reward): the environment with the reward `reward(action)`."""
    return Paid
