"""Builds algorithms on small models and runs them in small environments."""

import functools

import numpy as np
import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils._python_dispatch import TorchDispatchMode

from etpo.algorithms.archer import ArCHer
from etpo.algorithms.etpo import ETPO
from etpo.algorithms.gigpo import GiGPO
from etpo.algorithms.ppo import PPO
from etpo.algorithms.reinforce import Reinforce
from etpo.environments.text_env import TextVectorEnv
from etpo.models.critics import HeadCritic, LanguageModelCritic, LoraCritic
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import CompletionTemplate
from etpo.rollout.datamodule import RolloutDataModule

SHARED = {"beta_final_factor": 1.0, "policy_lr": 3e-3, "critic_lr": 3e-3}
ETPO_SETTINGS = SHARED | {
    "beta": 0.01,
    "gamma": 0.9,
    "lambda_anneal_iters": None,
    "pessimism_threshold": 0.0,
    "normalize_by_advantage_rms": False,
    "clip": 0.2,
    "truncation_kl_coef": 1.0,
}
BASELINE_SETTINGS = SHARED | {"beta": 0.5, "gamma": 0.8, "clip": 0.2, "max_kl": None}
GROUPS = {"baseline": "group", "kl_in_loss": True, "average_tokens": True}
ALGORITHMS = {
    "etpo": (ETPO, ETPO_SETTINGS),
    "poad": (PPO, BASELINE_SETTINGS | {"lambda_": 0.5}),
    "ntpo": (PPO, BASELINE_SETTINGS | {"lambda_": 0.5, "token_discount": 0.8}),
    "ppo_kl": (PPO, BASELINE_SETTINGS | {"lambda_": 0.5, "unit": "action"}),
    "archer": (ArCHer, BASELINE_SETTINGS),
    "reinforce": (Reinforce, BASELINE_SETTINGS),
    "rloo": (Reinforce, BASELINE_SETTINGS | {"baseline": "leave_one_out"}),
    "grpo": (Reinforce, BASELINE_SETTINGS | GROUPS),
    "gigpo": (GiGPO, BASELINE_SETTINGS),
}
LORA_CRITIC = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def build_algorithm():
    """build_algorithm(name, policy, critic, ...): an algorithm from its parts."""

    def build(name, policy, critic, hidden_size=16, **changes):
        algorithm, settings = ALGORITHMS[name]
        if issubclass(algorithm, Reinforce) or critic is None:
            make = None
        elif critic is LanguageModelCritic:
            make = critic
        else:
            sizes = {"lora": LORA_CRITIC} if critic is LoraCritic else {}
            make = functools.partial(critic, hidden_size=hidden_size, **sizes)
        return algorithm.from_config(policy, make, **(settings | changes))

    return build


@pytest.fixture
def make_policy(checkpoint):
    """make_policy(family, ...): a function that builds a small random policy."""

    def make(family="llama", **settings):
        return functools.partial(
            LanguageModelPolicy, str(checkpoint(family)), CompletionTemplate(), **settings
        )

    return make


@pytest.fixture
def build_etpo(build_algorithm, make_policy):
    """build_etpo(critic, ...): ETPO on a small random model."""

    def build(critic=HeadCritic, min_p=0.0, **changes):
        return build_algorithm("etpo", make_policy(min_p=min_p), critic, 32, **changes)

    return build


@pytest.fixture
def build_baseline(build_algorithm, make_policy):
    """build_baseline(name, ...): a baseline on a small random model, the same every time."""

    def build(name, min_p=0.0, **changes):
        torch.manual_seed(0)
        return build_algorithm(name, make_policy(min_p=min_p), HeadCritic, **changes)

    return build


@pytest.fixture
def fit(tmp_path):
    """fit(module, env, iterations): trains and returns the data module.

    `trainer`: further arguments of the Trainer. Others are sizes of the data module.
    """

    def run(module, env, iterations, callbacks=(), trainer=None, **sizes):
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
        Trainer(
            max_epochs=iterations,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            callbacks=list(callbacks),
            default_root_dir=tmp_path,
            **(trainer or {}),
        ).fit(module, data)
        return data

    return run


@pytest.fixture
def assert_same_gradient():
    """assert_same_gradient(loss, expected, parameters, rtol, atol), parameter by parameter."""

    def check(loss, expected, parameters, rtol, atol):
        for one, two in zip(
            torch.autograd.grad(loss, parameters, allow_unused=True),
            torch.autograd.grad(expected, parameters, allow_unused=True),
            strict=True,
        ):
            assert (one is None) == (two is None)
            if one is not None:
                torch.testing.assert_close(one, two, rtol=rtol, atol=atol)

    return check


class Paid(TextVectorEnv):
    """An environment whose rewards are `reward(action)`."""

    task_name = "paid"

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


class MostTokens(TorchDispatchMode):
    """Record the largest number of tokens in a tensor over the vocabulary.

    weights: shapes of the weights, which have the vocabulary but no tokens.
    """

    def __init__(self, vocabulary, weights):
        super().__init__()
        self.vocabulary, self.weights, self.tokens = vocabulary, set(weights), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(outputs):
            if not isinstance(tensor, torch.Tensor):
                continue
            shape = tuple(tensor.shape)
            weight = {shape, shape[::-1]} & self.weights
            expanded = tensor.nbytes > tensor.untyped_storage().nbytes()  # a weight's view
            if self.vocabulary in shape and len(shape) > 1 and not weight and not expanded:
                self.tokens = max(self.tokens, tensor.numel() // self.vocabulary)
        return outputs


@pytest.fixture
def most_tokens():
    """most_tokens(vocabulary, weights): `MostTokens`."""
    return MostTokens
