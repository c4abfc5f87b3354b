"""Checkpointing of activations changes no number."""

import re
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from etpo.errors import ConfigError
from etpo.generation.sampler import generate
from etpo.models.critics import LanguageModelCritic
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import CompletionTemplate

from ..by_token import critic_outputs, hidden_states, log_probs

OBSERVATIONS = [
    {"instruction": "", "prefix": p, "suffix": ""}
    for p in ("go", "a longer prompt", "go", "x", "a longer prompt")
]
FAMILIES = ["llama", "qwen", "starcoder"]


@pytest.fixture
def inputs(checkpoint):
    """inputs(policy): prompts with repetitions, and random actions of six tokens."""

    def make(policy):
        prompts = policy.encode(OBSERVATIONS)
        generator = torch.Generator().manual_seed(0)
        actions = torch.randint(3, policy.vocabulary_size, (5, 6), generator=generator)
        return prompts.ids, prompts.mask, actions

    return make


def build(folder, **settings):
    return LanguageModelPolicy(str(folder), CompletionTemplate(), **settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_layers_run_again_and_give_the_same(checkpoint, inputs, family):
    plain = build(checkpoint(family))
    saving = build(checkpoint(family), gradient_checkpointing=True)
    tensors = inputs(plain)
    calls = {plain: 0, saving: 0}
    gradients = []
    for policy in (plain, saving):

        def count(*_, policy=policy):
            calls[policy] += 1

        mlp = next(m for name, m in policy.model.named_modules() if name.endswith("layers.0.mlp"))
        log_pi = log_probs(policy, *tensors)
        mlp.register_forward_pre_hook(count)  # from here on: what the backward pass runs again
        weights = torch.randn(log_pi.shape, generator=torch.Generator().manual_seed(1))
        loss = (log_pi * weights).sum()
        gradients.append(torch.autograd.grad(loss, policy.trainable_parameters()))
    assert calls == {plain: 0, saving: 1}
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert not any(module.training for module in saving.modules())


SIZES = {
    "vocab_size": 266,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
WITH_DROPOUT = {
    "llama": {},
    "qwen2": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global"], 2]]},
    "gpt_neox": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {},
    "falcon": {},
    "phi": {},
    "phimoe": {},
    "mixtral": {},
    "starcoder2": {},
    "biogpt": {},
    "xglm": {"ffn_dim": 64},
}


def with_dropout(folder, kind):
    """A random model that drops half of everything that its configuration can drop, in training."""
    sizes = SIZES | WITH_DROPOUT.get(kind, {})
    config = AutoConfig.for_model(kind)
    known = {*config.to_dict(), *config.attribute_map}
    raised = {
        key: 0.5
        for key, value in config.to_dict().items()
        if re.search("drop|jitter", key) and isinstance(value, int | float)
    }
    assert raised
    config = AutoConfig.for_model(kind, **raised, **{k: v for k, v in sizes.items() if k in known})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", WITH_DROPOUT)
def test_nothing_is_dropped_where_layers_are_checkpointed(kind, checkpoint, inputs, tmp_path):
    """Sampling, annotation (without gradients) and training see one policy; so do the critics."""
    shutil.copytree(checkpoint("llama"), tmp_path / kind)
    (tmp_path / kind / "model.safetensors").unlink()
    folder = with_dropout(tmp_path / kind, kind)
    gradients, said = [], []
    for checkpointed in (False, True):
        policy = build(
            folder, gradient_checkpointing=checkpointed, attn_implementation="eager"
        ).train()
        tensors = inputs(policy)
        log_pi = log_probs(policy, *tensors)
        weights = torch.randn(log_pi.shape, generator=torch.Generator().manual_seed(1))
        loss = (log_pi * weights).sum()
        gradients.append(
            torch.autograd.grad(loss, policy.trainable_parameters(), allow_unused=True)
        )
        critic = LanguageModelCritic(policy).train()
        with torch.no_grad():
            said += [log_pi.detach(), log_probs(policy, *tensors)]
            said += [log_probs(policy, *tensors, reference=True)]
            said += [critic_outputs(critic, policy, *tensors)[1].log_softmax(-1)]
        prompts = policy.encode(OBSERVATIONS)
        taken = generate(policy, prompts, 6, torch.Generator().manual_seed(0))
        with torch.no_grad():
            again = hidden_states(policy, prompts.ids, prompts.mask, taken.ids)
        again = again * taken.mask[..., None]
        torch.testing.assert_close(taken.hidden_states, again, rtol=1e-3, atol=1e-3)
    for one in said:
        torch.testing.assert_close(one, said[0], rtol=0, atol=1e-4)
    largest = max(float(one.abs().max()) for one in gradients[0] if one is not None)
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * largest)


def test_a_model_without_layers_to_checkpoint_is_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint("llama"), tmp_path / "gpt")
    (tmp_path / "gpt" / "model.safetensors").unlink()
    folder = with_dropout(tmp_path / "gpt", "openai-gpt")
    with pytest.raises(ConfigError, match="^model.gradient_checkpointing=true: allowed is false"):
        build(folder, attn_implementation="eager", gradient_checkpointing=True)
