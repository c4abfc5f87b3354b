"""In bfloat16 a policy that has not moved is where its tokens were drawn."""

import functools

import pytest
import torch
from etpo.algorithms.ppo_kl import PPOKL

from etpo.algorithms.etpo import ETPO
from etpo.models.critics import HeadCritic
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import CompletionTemplate

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("algorithm", [ETPO, PPOKL])
@pytest.mark.parametrize(
    ("model", "precision"),
    [
        ({"dtype": "bfloat16"}, "32-true"),
        ({"dtype": "bfloat16", "lora": LORA, "gradient_checkpointing": True}, "bf16-mixed"),
        ({}, "bf16-mixed"),
    ],
)
def test_a_policy_at_rest_has_no_distance(
    model, precision, algorithm, chunk, checkpoint, build_algorithm, letter_env, fit
):
    folder = str(checkpoint("llama"))
    policy = functools.partial(LanguageModelPolicy, folder, CompletionTemplate(), **model)
    module = build_algorithm(algorithm, policy, HeadCritic, policy_lr=0.0, logits_chunk_size=chunk)
    data = fit(module, letter_env(8), 1, max_new_tokens=40, trainer={"precision": precision})
    assert data.rollout.actions.action_mask.sum(1).float().mean() > 30
    metrics = module.trainer.callback_metrics
    assert abs(metrics["rollout/kl_to_reference"]) < 1e-4  # nats; 4e-3 by the sampler's rounding
    assert abs(metrics["train/kl_to_old"]) < 1e-4
    assert metrics["train/critic_loss"].dtype == torch.float32
