"""Builds algorithms on small models and runs them in small environments."""

import functools

import numpy as np
import pytest
import torch
from etpo.algorithms.ntpo import NTPO
from etpo.algorithms.poad import POAD
from etpo.algorithms.ppo_kl import PPOKL
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils._python_dispatch import TorchDispatchMode

from etpo.algorithms.archer import ArCHer
from etpo.algorithms.etpo import ETPO
from etpo.models.critics import HeadCritic, LanguageModelCritic, LoraCritic
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import CompletionTemplate
from etpo.rollout.datamodule import RolloutDataModule

ETPO_SETTINGS = {
    "beta": 0.01,
    "beta_final_factor": 1.0,
    "beta_anneal_iters": 1,
    "gamma": 0.9,
    "lambda_": 0.9,
    "lambda_anneal_iters": None,
    "eta": 0.05,
    "pessimism_threshold": 0.0,
    "doubly_robust": True,
    "normalize_by_advantage_rms": False,
    "clip_low": 0.2,
    "clip_high": 0.2,
    "truncation_kl_coef": 1.0,
    "max_kl": 0.5,
    "tau": 1.0,
    "policy_lr": 3e-3,
    "critic_lr": 3e-3,
    "critic_loss": "huber",
    "huber_delta": 1.0,
    "max_grad_norm": 1.0,
    "forward_batch_size": 8,
    "logits_chunk_size": None,
}

WITH_CRITIC = {POAD: {"lambda_": 0.5}, NTPO: {"lambda_": 0.5}, PPOKL: {"lambda_": 0.5}}
BASELINE_SETTINGS = {
    "beta": 0.5,
    "beta_final_factor": 1.0,
    "beta_anneal_iters": 1,
    "truncation_kl_coef": 0.2,
    "gamma": 0.8,
    "clip": 0.2,
    "max_kl": None,
    "policy_lr": 3e-3,
    "critic_lr": 3e-3,
    "max_grad_norm": 1.0,
    "forward_batch_size": 8,
    "logits_chunk_size": None,
}


@pytest.fixture
def etpo_settings():
    """The keyword arguments of `build_etpo`'s module."""
    return dict(ETPO_SETTINGS)


@pytest.fixture
def build_etpo(checkpoint, etpo_settings):
    """build_etpo(critic, ...): ETPO, or a `variant` of it, on a small random model."""

    def build(critic=HeadCritic, min_p=0.0, variant=ETPO, **changes):
        return variant(
            lambda: LanguageModelPolicy(
                str(checkpoint("llama")), CompletionTemplate(), min_p=min_p
            ),
            functools.partial(critic, hidden_size=32),
            functools.partial(torch.optim.AdamW, eps=1e-5, weight_decay=0.0),
            **(etpo_settings | changes),
        )

    return build


@pytest.fixture
def build_baseline(checkpoint):
    """build_baseline(algorithm, ...): a baseline on a small random model, the same every time."""

    def make(algorithm, min_p=0.0, **changes):
        own = WITH_CRITIC.get(algorithm, {"tau": 1.0} if algorithm is ArCHer else {})
        torch.manual_seed(0)
        has_critic = algorithm in WITH_CRITIC or algorithm is ArCHer
        return algorithm(
            lambda: LanguageModelPolicy(
                str(checkpoint("llama")), CompletionTemplate(), min_p=min_p
            ),
            functools.partial(HeadCritic, hidden_size=16) if has_critic else None,
            functools.partial(torch.optim.AdamW, eps=1e-5, weight_decay=0.0),
            **(BASELINE_SETTINGS | own | changes),
        )

    return make


@pytest.fixture
def build_algorithm():
    """build_algorithm(algorithm, policy, critic, ...): any algorithm, from its parts."""

    def make(algorithm, policy, critic, **changes):
        settings = ETPO_SETTINGS if issubclass(algorithm, ETPO) else BASELINE_SETTINGS
        own = WITH_CRITIC.get(algorithm, {"tau": 1.0} if algorithm is ArCHer else {})
        sizes = {} if critic is LanguageModelCritic else {"hidden_size": 16}
        if critic is LoraCritic:
            sizes["lora"] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
        return algorithm(
            policy,
            None if critic is None else functools.partial(critic, **sizes),
            functools.partial(torch.optim.AdamW, eps=1e-5, weight_decay=0.0),
            **(settings | own | changes),
        )

    return make


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


class Paid:
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
    """Watches, in `tokens`, for how many tokens at once a tensor over the vocabulary is computed.

    weights: shapes that have the vocabulary too, and no token.
    """

    def __init__(self, vocabulary, weights):
        super().__init__()
        self.vocabulary, self.weights, self.tokens = vocabulary, set(weights), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(outputs):
            shape = tuple(getattr(tensor, "shape", ()))
            weight = {shape, shape[::-1]} & self.weights
            if self.vocabulary in shape and len(shape) > 1 and not weight:
                self.tokens = max(self.tokens, tensor.numel() // self.vocabulary)
        return outputs


@pytest.fixture
def most_tokens():
    """most_tokens(vocabulary, weights): `MostTokens`."""
    return MostTokens
