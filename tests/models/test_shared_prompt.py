"""Sharing prompts changes no number; neither does checkpointing of activations."""

import re
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from etpo.errors import ConfigError
from etpo.generation.sampler import generate
from etpo.models.causal_lm import trunk_of
from etpo.models.critics import LanguageModelCritic, TrunkCritic
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import CompletionTemplate
from etpo.models.shared_prompt import forward_actions, position_ids, prefill

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


def plain_log_probs(policy, model, prompt_ids, prompt_mask, action_ids):
    """log pi [B, L, V] by one ordinary forward over the whole sequences."""
    mask = torch.nn.functional.pad(prompt_mask, (0, action_ids.shape[1] - 1), value=True)
    output = model(
        input_ids=torch.cat([prompt_ids, action_ids[:, :-1]], dim=1),
        attention_mask=mask.long(),
        position_ids=position_ids(mask),
        use_cache=False,
    )
    return output.logits[:, -action_ids.shape[1] :, : policy.vocabulary_size].log_softmax(-1)


def log_probs_of(policy, *inputs, **side):
    return policy.log_probs(policy.hidden_states(*inputs, **side), **side).log_probs


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_are_those_of_whole_sequences(checkpoint, inputs, family):
    policy = build(checkpoint(family))
    parameters = policy.trainable_parameters()
    tensors = inputs(policy)
    expected = plain_log_probs(policy, policy.model, *tensors)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    shared = log_probs_of(policy, *tensors)
    torch.testing.assert_close(shared, expected, rtol=0, atol=1e-5)
    gradients = torch.autograd.grad((shared * weights).sum(), parameters)
    plain = torch.autograd.grad((expected * weights).sum(), parameters)
    for one, other in zip(gradients, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def record_sizes(trunk):
    """The shapes of input_ids of every call, as they come."""
    sizes = []
    trunk.register_forward_pre_hook(
        lambda _, args, given: sizes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    return sizes


def test_distinct_prompts_run_once(checkpoint, inputs):
    policy = build(checkpoint("llama"))
    prompt_ids, prompt_mask, _ = inputs(policy)
    trunk = trunk_of(policy.model)
    sizes = record_sizes(trunk)
    filled = prefill(trunk, prompt_ids, prompt_mask)
    assert sizes == [(3, prompt_ids.shape[1])]
    assert len(filled.hidden_states) == len(filled.cache.layers[0].keys) == 3
    assert filled.prompt_index[1] == filled.prompt_index[4] != filled.prompt_index[0]


def test_rows_that_differ_in_the_last_token_alone_run_once(checkpoint, inputs):
    policy = build(checkpoint("llama"))
    prompt_ids, prompt_mask, actions = inputs(policy)
    actions[2, :-1] = actions[0, :-1]  # on the same prompt
    actions[4, 1:] = actions[1, 1:]  # another first token
    trunk = trunk_of(policy.model)
    sizes = record_sizes(trunk)
    tensors = prompt_ids, prompt_mask, actions
    states = forward_actions(trunk, *tensors)
    assert [rows for rows, _ in sizes] == [3, 4]
    expected = plain_log_probs(policy, policy.model, *tensors)
    torch.testing.assert_close(policy.log_probs(states).log_probs, expected, rtol=0, atol=1e-5)


def test_the_mask_tells_prompts_of_equal_ids_apart(checkpoint):
    policy = build(checkpoint("llama"))
    ids = torch.tensor([[9, 7, 8, 7]] * 2)
    mask = torch.tensor([[True] * 4, [False, True, True, True]])
    first = log_probs_of(policy, ids, mask, ids[:, :2])
    alone = [log_probs_of(policy, ids[i : i + 1], mask[i : i + 1], ids[:1, :2]) for i in range(2)]
    torch.testing.assert_close(first, torch.cat(alone), rtol=0, atol=1e-5)
    assert (first[0] - first[1]).abs().max() > 1e-3


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
        log_probs = log_probs_of(policy, *tensors)
        mlp.register_forward_pre_hook(count)  # from here on: what the backward pass runs again
        weights = torch.randn(log_probs.shape, generator=torch.Generator().manual_seed(1))
        loss = (log_probs * weights).sum()
        gradients.append(torch.autograd.grad(loss, policy.trainable_parameters()))
    assert calls == {plain: 0, saving: 1}
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert not any(module.training for module in saving.modules())


def test_the_trunk_critic_reads_whole_sequences(checkpoint, inputs):
    policy = build(checkpoint("llama"))
    critic = TrunkCritic(policy, hidden_size=16)
    for layer in (critic.head.value, critic.head.advantage):
        torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(2))
    prompt_ids, prompt_mask, actions = inputs(policy)
    features = torch.zeros(5, 6, policy.hidden_size)
    value, advantage = critic(prompt_ids, prompt_mask, actions, features)
    mask = torch.nn.functional.pad(prompt_mask, (0, 5), value=True)
    states = critic.trunk(
        input_ids=torch.cat([prompt_ids, actions[:, :-1]], dim=1),
        attention_mask=mask.long(),
        position_ids=position_ids(mask),
        use_cache=False,
    ).last_hidden_state[:, -6:]
    for one, other in zip((value, advantage), critic.head(states), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


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
        log_probs = log_probs_of(policy, *tensors)
        weights = torch.randn(log_probs.shape, generator=torch.Generator().manual_seed(1))
        loss = (log_probs * weights).sum()
        gradients.append(
            torch.autograd.grad(loss, policy.trainable_parameters(), allow_unused=True)
        )
        critic = LanguageModelCritic(policy).train()
        with torch.no_grad():
            features = torch.zeros(5, 6, policy.hidden_size)
            said += [log_probs.detach(), log_probs_of(policy, *tensors)]
            said += [log_probs_of(policy, *tensors, reference=True)]
            said += [critic(*tensors, features)[1].log_softmax(-1)]
        prompts = policy.encode(OBSERVATIONS)
        taken = generate(policy, prompts, 6, torch.Generator().manual_seed(0))
        with torch.no_grad():
            again = policy.hidden_states(prompts.ids, prompts.mask, taken.ids)
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
