"""An adapter that is switched off leaves the model as it was, whatever it trains."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from etpo.errors import ConfigError
from etpo.models.adapters import add_adapter, inject_adapter, without_adapter
from etpo.models.critics import LoraCritic
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import CompletionTemplate

TARGETS = {"target_modules": ["q_proj", "v_proj"]}
HELD = {
    "two matrices": TARGETS,
    "all matrices": {"target_modules": "all-linear", "use_rslora": True},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "output": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "gaussian": {**TARGETS, "init_lora_weights": "gaussian"},
    "DoRA": {**TARGETS, "use_dora": True},
    "parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    "whole embedding": {**TARGETS, "modules_to_save": ["embed_tokens"]},
    "whole output": {**TARGETS, "modules_to_save": ["lm_head"]},
    "norms": {**TARGETS, "modules_to_save": ["norm", "input_layernorm"]},
    "tied": {**TARGETS, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "two tokens": {**TARGETS, "trainable_token_indices": [5, 6]},
}
REFUSED = {
    "bias=all": {**TARGETS, "bias": "all"},
    "lora_dropout=0.1": {**TARGETS, "lora_dropout": 0.1},
    "bias=lora_only": {**TARGETS, "bias": "lora_only"},
    "init_lora_weights=pissa": {**TARGETS, "init_lora_weights": "pissa"},
    "init_lora_weights=False": {**TARGETS, "init_lora_weights": False},
    "lora_bias=True": {**TARGETS, "lora_bias": True},
    "layer_replication=": {**TARGETS, "layer_replication": [[0, 2], [1, 2]]},
    "alora_invocation_tokens=": {**TARGETS, "alora_invocation_tokens": [5]},
    "inference_mode=True": {**TARGETS, "inference_mode": True},
    "task_type=SEQ_CLS": {**TARGETS, "task_type": "SEQ_CLS"},
    "typo=3": {**TARGETS, "typo": 3},
    " ": {"target_modules": ["nowhere"]},
}


def model(tied: bool):
    """A random Qwen2, whose projections have biases."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = AutoConfig.for_model(
        "qwen2", vocab_size=266, tie_word_embeddings=tied, initializer_range=0.2, **sizes, **heads
    )
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def logits(of):
    return of(input_ids=torch.tensor([[5, 70, 6, 71]]), use_cache=False).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("settings", HELD.values(), ids=HELD)
def test_training_moves_the_policy_alone(settings, tied):
    base = model(tied)
    before = logits(base)
    policy = add_adapter(base, settings).eval()
    torch.testing.assert_close(logits(policy), before, rtol=0, atol=1e-5)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    assert (logits(policy) - before).abs().max() > 1e-2
    with policy.disable_adapter():
        assert torch.equal(logits(policy), before)
    assert torch.equal(logits(without_adapter(copy.deepcopy(policy))), before)


@pytest.mark.parametrize(("named", "settings"), REFUSED.items(), ids=REFUSED)
def test_what_would_move_the_reference_is_refused(named, settings):
    for key, add in (("model.lora", add_adapter), ("critic.lora", inject_adapter)):
        with pytest.raises(ConfigError) as refused:
            add(model(True), settings)
        assert str(refused.value).startswith(key)
        assert named in str(refused.value)
        assert "\n" not in str(refused.value)


def test_a_trained_weight_outside_of_the_adapter_is_refused(monkeypatch):
    """Where peft marks more than the adapter, by a setting or version that nobody knows."""
    monkeypatch.setitem(add_adapter.__globals__["VALUES"], "bias", ("none", "all"))
    with pytest.raises(ConfigError, match=r"model.lora: would train .*bias"):
        add_adapter(model(True), {**TARGETS, "bias": "all"})


def test_a_critic_s_adapter_trains_no_weight_of_the_backbone(checkpoint):
    policy = LanguageModelPolicy(str(checkpoint("qwen")), CompletionTemplate())
    for settings in ({**TARGETS, "bias": "all"}, {**TARGETS, "modules_to_save": ["norm"]}):
        with pytest.raises(ConfigError, match=r"critic\.lora"):
            LoraCritic(policy, lora=settings)
    LoraCritic(policy, lora=TARGETS)
    assert not any(p.requires_grad for p in policy.reference_model.parameters())
