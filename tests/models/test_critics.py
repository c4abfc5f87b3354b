"""Critics on one policy: what they say at first, what they train, and what they share."""

import functools
import threading

import pytest
import torch

from etpo.errors import ConfigError
from etpo.models.critic_heads import DuelingHead, ValueHead
from etpo.models.critics import (
    HeadCritic,
    LanguageModelCritic,
    LoraCritic,
    PolicyHeadCritic,
    TrunkCritic,
    make_target_network,
    polyak_update,
    snapshot,
)
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import CompletionTemplate

from ..by_token import tree_of

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
ADAPTED = functools.partial(LoraCritic, lora=LORA)
WITH_HEADS = [HeadCritic, PolicyHeadCritic, TrunkCritic, ADAPTED]


@pytest.fixture(
    params=[None, LORA | {"task_type": "CAUSAL_LM"}], ids=["full policy", "lora policy"]
)
def policy(checkpoint, request):
    folder = str(checkpoint("qwen"))
    return LanguageModelPolicy(folder, CompletionTemplate(), lora=request.param)


def inputs_of(policy):
    texts = [{"instruction": "", "prefix": p, "suffix": ""} for p in ("hello", "a longer prompt")]
    prompts = policy.encode(texts)
    tree = tree_of(prompts.ids, prompts.mask, torch.tensor([[5, 6, 7], [8, 9, 10]]))
    with torch.no_grad():
        return tree, policy.hidden_states(tree, reference=True), policy.hidden_states(tree)


def log_probs(policy, inputs, reference=True):
    hidden = policy.hidden_states(inputs[0], reference=reference)
    return policy.log_probs(hidden, reference=reference).log_probs


def ids(parameters):
    return {id(p) for p in parameters}


@pytest.mark.parametrize("critic_class", WITH_HEADS)
def test_a_dueling_critic_starts_at_zero_and_trains_nothing_of_the_policy(policy, critic_class):
    critic = critic_class(policy, hidden_size=16)
    value, advantage = critic(*inputs_of(policy))
    assert value.shape == (6,)
    assert advantage.shape == (6, policy.vocabulary_size)
    assert not value.any()
    assert not advantage.any()
    trained = ids(p for p in critic.parameters() if p.requires_grad)
    assert trained
    assert not trained & ids(policy.parameters())
    assert not ids(critic.parameters()) & ids(policy.trainable_parameters())


@torch.no_grad()
@pytest.mark.parametrize("critic_class", [HeadCritic, LanguageModelCritic])
def test_some_tokens_have_the_outputs_that_they_have_among_all(policy, critic_class):
    sizes = {"hidden_size": 16} if critic_class is HeadCritic else {}
    critic = critic_class(policy, **sizes)
    generator = torch.Generator().manual_seed(0)
    for parameter in critic.head_parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    hidden = torch.randn(5, policy.hidden_size, generator=generator)
    tokens = torch.tensor([3, 4, 77, policy.vocabulary_size - 1])
    (value, scores), (same, some) = critic.head(hidden), critic.head(hidden, tokens)
    assert same is value is None or torch.equal(same, value)
    torch.testing.assert_close(some, scores[:, tokens])
    assert scores.std() > 0.01


def test_the_critic_of_the_paper_says_the_logits_of_the_reference_at_first(policy):
    critic = LanguageModelCritic(policy)
    inputs = inputs_of(policy)
    value, q = critic(*inputs)
    assert value is None
    log_ref = log_probs(policy, inputs)
    torch.testing.assert_close(q.log_softmax(-1), log_ref, rtol=0, atol=1e-5)
    assert not ids(critic.parameters()) & ids(policy.parameters())
    assert all(p.requires_grad for p in critic.parameters())


def test_an_adapter_holds_the_weights_of_the_language_model_once(policy):
    critic = ADAPTED(policy, hidden_size=16)
    target = make_target_network(critic)
    own = [name for name, p in critic.named_parameters() if p.requires_grad]
    assert own
    assert all("lora_" in name or name.startswith("head.") for name in own)
    frozen = ids(p for p in critic.parameters() if not p.requires_grad)
    assert frozen
    assert frozen <= ids(policy.parameters())
    assert ids(critic.parameters()) & ids(target.parameters()) == frozen


@pytest.mark.parametrize("critic_class", WITH_HEADS)
def test_a_target_follows_what_the_critic_trains_and_nothing_else(policy, critic_class):
    critic = critic_class(policy, hidden_size=16)
    target = make_target_network(critic)
    assert not any(p.requires_grad for p in target.parameters())
    before = [p.clone() for p in target.parameters()]
    inputs = inputs_of(policy)
    reference = log_probs(policy, inputs)
    with torch.no_grad():
        for parameter in critic.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    polyak_update(target, critic, 0.25)
    for old, now, source in zip(before, target.parameters(), critic.parameters(), strict=True):
        torch.testing.assert_close(now, 0.75 * old + 0.25 * source)
        assert torch.equal(old, now) == (not source.requires_grad)
    assert torch.equal(reference, log_probs(policy, inputs))


def test_an_adapter_moves_the_critic_and_neither_policy_nor_reference(policy):
    critic = ADAPTED(policy, hidden_size=16)
    inputs = inputs_of(policy)
    before = [log_probs(policy, inputs, r) for r in (False, True)]
    for layer in (critic.head.value, critic.head.advantage):
        torch.nn.init.normal_(layer.weight)
    first = critic(*inputs)[1]
    with torch.no_grad():
        for name, parameter in critic.named_parameters():
            if "lora_" in name:
                parameter.add_(0.5)
    assert (critic(*inputs)[1] - first).abs().max() > 1e-2
    after = [log_probs(policy, inputs, r) for r in (False, True)]
    assert all(map(torch.equal, before, after))


def test_an_adapter_on_bfloat16_weights_is_trained_in_float32(checkpoint):
    lora = LORA | {"task_type": "CAUSAL_LM"}
    folder = str(checkpoint("qwen"))
    policy = LanguageModelPolicy(folder, CompletionTemplate(), dtype="bfloat16", lora=lora)
    critic = ADAPTED(policy, hidden_size=16)
    types = {p.requires_grad: p.dtype for p in critic.trunk.parameters()}
    assert types == {True: torch.float32, False: torch.bfloat16}
    value, advantage = critic(*inputs_of(policy))
    assert value.dtype == advantage.dtype == torch.float32


@pytest.mark.parametrize("head", [DuelingHead, ValueHead])
def test_heads_compute_in_float32_in_mixed_precision(head):
    torch.manual_seed(0)
    layers = head(8, 5, 16)
    for parameter in layers.parameters():
        torch.nn.init.normal_(parameter)
    features = torch.randn(2, 3, 8)
    expected = layers(features)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = layers(features)
    for one, other in zip([*outputs], [*expected], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("critic_class", [TrunkCritic, ADAPTED, LanguageModelCritic])
def test_a_critic_computes_activations_again_where_the_model_does(checkpoint, critic_class):
    gradients, calls = [], []
    for checkpointed in (False, True):
        folder = str(checkpoint("qwen"))
        policy = LanguageModelPolicy(
            folder, CompletionTemplate(), gradient_checkpointing=checkpointed
        )
        torch.manual_seed(0)
        critic = critic_class(policy)
        for parameter in critic.parameters():
            if parameter.requires_grad and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
        said = [output for output in critic(*inputs_of(policy)) if output is not None]
        loss = sum(output.square().sum() for output in said)
        mlp = next(m for name, m in critic.named_modules() if name.endswith("layers.0.mlp"))
        mlp.register_forward_pre_hook(lambda *_, of=checkpointed: calls.append(of))
        trained = [p for p in critic.parameters() if p.requires_grad]
        gradients.append(torch.autograd.grad(loss, trained))
    assert calls == [True]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


def test_bad_settings_are_config_errors(checkpoint):
    policy = LanguageModelPolicy(str(checkpoint("llama")), CompletionTemplate())
    with pytest.raises(ConfigError, match="critic.lora: .*nowhere"):
        LoraCritic(policy, lora={"target_modules": ["nowhere"]})
    with pytest.raises(ConfigError, match="critic.lora.unknown=1: allowed"):
        LoraCritic(policy, lora={"unknown": 1})
    with pytest.raises(ConfigError, match="critic=lm_copy: allowed are full, lora, frozen_trunk"):
        LanguageModelCritic(policy, head=ValueHead)


def test_a_snapshot_keeps_the_weights_and_leaves_hooks_behind(policy):
    lock = threading.Lock()  # cannot be copied, as the records of a profiler
    head = policy.lm_head
    head.register_forward_hook(lambda *_, lock=lock: lock.acquire())
    head.register_forward_hook(functools.partial(print, lock))
    hidden = torch.randn(2, policy.hidden_size)
    copied = snapshot(head)
    with torch.no_grad():
        expected = torch.nn.functional.linear(hidden, head.weight).clone()
        if head.weight.requires_grad:
            head.weight.add_(1.0)
        torch.testing.assert_close(copied(hidden), expected)
    assert not lock.locked()
    assert (copied.weight is head.weight) == (not head.weight.requires_grad)


def test_a_tied_head_scores_tokens_against_the_shared_lm_head(policy):
    critic = HeadCritic(policy, hidden_size=8, tie_embeddings=True)
    size, width = policy.vocabulary_size, policy.hidden_size
    trained = [p for p in critic.parameters() if p.requires_grad]
    assert all(size not in p.shape for p in trained)
    hidden, ids = torch.randn(3, width), torch.tensor([1, 5, size - 1])
    value, advantage = critic.head(hidden)
    assert advantage.shape == (3, size)
    assert not value.any()
    assert not advantage.any()
    with torch.no_grad():
        critic.head.advantage.weight.normal_()
    whole, some = critic.head(hidden)[1], critic.head(hidden, ids)[1]
    assert whole.abs().max() > 0
    torch.testing.assert_close(some, whole[:, ids])
    target = make_target_network(critic)
    assert target.head.embeddings.weight is critic.head.embeddings.weight
    assert target.head.advantage.weight is not critic.head.advantage.weight
