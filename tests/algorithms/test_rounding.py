"""In bfloat16 the probability ratios of an unchanged policy are exactly 1."""

import pytest
import torch

from etpo.models.critics import HeadCritic

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize("chunk", [4096, 7])
@pytest.mark.parametrize("algorithm", ["etpo", "ppo_kl"])
@pytest.mark.parametrize(
    ("model", "precision"),
    [
        ({"dtype": "bfloat16"}, "32-true"),
        ({"dtype": "bfloat16", "lora": LORA, "gradient_checkpointing": True}, "bf16-mixed"),
        ({}, "bf16-mixed"),
    ],
)
def test_an_unchanged_policy_has_no_kl(
    model, precision, algorithm, chunk, make_policy, build_algorithm, letter_env, fit
):
    settings = {"policy_lr": 0.0, "logits_chunk_size": chunk}
    module = build_algorithm(algorithm, make_policy(**model), HeadCritic, **settings)
    data = fit(module, letter_env(8), 1, max_new_tokens=40, trainer={"precision": precision})
    assert data.rollout.actions.action_mask.sum(1).float().mean() > 30
    metrics = module.trainer.callback_metrics
    assert abs(metrics["rollout/kl_to_reference"]) < 1e-4  # nats; 4e-3 by the sampler's rounding
    assert abs(metrics["train/kl_to_old"]) < 1e-4
    assert metrics["train/critic_loss"].dtype == torch.float32
