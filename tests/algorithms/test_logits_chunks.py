"""`algorithm.logits_chunk_size`: the same targets, losses and gradients, in bounded memory."""

import math

import pytest
import torch

from etpo.models.critics import HeadCritic, LanguageModelCritic, LoraCritic, TrunkCritic
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import CompletionTemplate

from ..by_token import any_token, tree_of
from ..models.architectures import ARCHITECTURES, save_architecture

LORA = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
ADAPTED = {"lora": LORA | {"target_modules": ["q_proj", "v_proj"]}}
ADAPTED_HEAD = {"lora": LORA | {"target_modules": ["q_proj", "lm_head"]}}
ONE_CHUNK, CHUNK = 4096, 7
# algorithm, family, critic, arguments of the policy, of the algorithm
KINDS = {
    "full critic": ("etpo", "llama", TrunkCritic, {"min_p": 0.1}, {"pessimism_threshold": 1.0}),
    "head critic": (
        *("etpo", "llama", HeadCritic, {"temperature": 0.7}),
        {"pessimism_threshold": 0.5, "critic_loss": "mse"},
    ),
    "lm_copy": ("etpo", "qwen", LanguageModelCritic, {}, {"doubly_robust": False}),
    "adapters": ("etpo", "qwen", LoraCritic, ADAPTED | {"min_p": 0.1}, {}),
    "adapter on the LM head": ("etpo", "llama", HeadCritic, ADAPTED_HEAD, {}),
    "checkpointed": ("etpo", "starcoder", HeadCritic, {"gradient_checkpointing": True}, {}),
    "scaled logits": ("etpo", "cohere", LanguageModelCritic, {"min_p": 0.1}, {}),
    "poad": ("poad", "llama", HeadCritic, {"min_p": 0.1}, {}),
    "ppo_kl": ("ppo_kl", "llama", HeadCritic, {}, {}),
    "archer": ("archer", "llama", TrunkCritic, {"min_p": 0.1}, {}),
    "grpo": ("grpo", "qwen", None, ADAPTED, {}),
}


@pytest.fixture
def pair(make_policy, build_algorithm, letter_env, paid, fit):
    """pair(kind): modules with one chunk and with many, their weights alike, and a rollout."""

    def make(kind):
        algorithm, family, critic, model, changes = KINDS[kind]
        modules = []
        for chunk in (ONE_CHUNK, CHUNK):
            torch.manual_seed(0)
            settings = changes | {"logits_chunk_size": chunk, "max_kl": None}
            policy = make_policy(family, **model)
            modules.append(build_algorithm(algorithm, policy, critic, **settings))
        whole, chunked = modules
        env = paid(letter_env(4), lambda action: sum(map(ord, action)) % 7 / 7)
        rollout = fit(whole, env, 1, minibatch_size=32, update_epochs=2).rollout
        for parameter in whole.critic.parameters() if whole.critic else ():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        chunked.load_state_dict(whole.state_dict())
        chunked.trainer = whole.trainer
        for module in modules:
            module.log_metrics = lambda metrics: None
        return whole, chunked, rollout

    return make


def move(module):
    """Move the policy away from pi_old and the critic from its target."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def gradients(module, loss):
    names, parameters = zip(*module.named_parameters(), strict=True)
    trained = [p for p in parameters if p.requires_grad]
    names = [n for n, p in zip(names, parameters, strict=True) if p.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_targets_losses_and_gradients_are_the_same(kind, pair):
    whole, chunked, rollout = pair(kind)
    batches = [module.compute_targets(rollout) for module in (whole, chunked)]
    for name in ("returns", "advantages", "old_log_probs", "ref_log_probs"):
        expected, found = (getattr(batch, name) for batch in batches)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert batches[0].advantages.abs().max() > 0.01
    assert chunked.iteration_metrics == pytest.approx(whole.iteration_metrics, rel=1e-3, abs=1e-4)
    losses, found = [], []
    for module, batch in zip((whole, chunked), batches, strict=True):
        move(module)
        loss = module.training_step(batch, batch_idx=1)
        losses.append((loss.detach(), module.step_kls[-1]))
        found.append(gradients(module, loss))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    assert losses[0][1] > 1e-4  # the old policy is another
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        size = float(expected.abs().max())
        torch.testing.assert_close(found[1][name], expected, rtol=1e-3, atol=1e-4 * size + 1e-7)
    assert sum(bool(g.any()) for g in found[0].values()) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_no_more_than_a_chunk_goes_through_the_vocabulary(kind, pair, most_tokens):
    *modules, rollout = pair(kind)
    seen = []
    for module in modules:
        size = module.policy.lm_head.weight.shape
        hidden = {32, 16, 4}  # of the model, of the critic, of the adapters
        counted = []
        for vocabulary in {module.policy.vocabulary_size, size[0]}:
            with most_tokens(vocabulary, [(vocabulary, width) for width in hidden]) as most:
                batch = module.compute_targets(rollout)
                module.training_step(batch, batch_idx=1).backward()
            counted.append(most.tokens)
        seen.append(max(counted))
    tokens = rollout.actions.action_mask.numel()
    assert seen[1] <= math.ceil(CHUNK * size[0] / module.policy.vocabulary_size)
    assert seen[0] >= tokens / 4  # a half of the actions, of which some are alike


@pytest.mark.parametrize("critic", [HeadCritic, TrunkCritic])
def test_it_trains_in_chunks(critic, build_etpo, letter_env, fit):
    module = build_etpo(critic, min_p=0.05, logits_chunk_size=16)
    before = [p.clone() for p in module.policy.trainable_parameters()]
    fit(module, letter_env(4), 2)
    pairs = zip(before, module.policy.trainable_parameters(), strict=True)
    assert max((old - new).abs().max() for old, new in pairs) > module.settings.policy_lr / 2
    assert not any("old" in name for name in module.state_dict())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Cohere", {"logit_scale": 0.5}),
        ("Granite", {"logits_scaling": 2.0}),
        ("Gemma 2", {"final_logit_softcapping": 1.0}),
    ],
)
@torch.no_grad()
def test_scaled_and_capped_logits_equal_a_forward_of_the_model(
    name, changes, checkpoint, build_algorithm, tmp_path
):
    architecture = ARCHITECTURES[name]
    architecture = architecture._replace(changes=architecture.changes | changes)
    folder = save_architecture(tmp_path / "model", architecture, checkpoint("llama"))

    def policy():
        attention = architecture.attn_implementation
        return LanguageModelPolicy(str(folder), CompletionTemplate(), attn_implementation=attention)

    module = build_algorithm("etpo", policy, LanguageModelCritic, logits_chunk_size=CHUNK)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.policy.trainable_parameters():  # policy, reference and critic differ
        parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    for parameter in module.target_critic.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    ids = torch.randint(3, 200, (3, 10), generator=generator)
    prompts, actions = ids[:, :4], ids[:, 4:]
    tree = tree_of(prompts, torch.ones_like(prompts).bool(), actions)
    evaluation = module.evaluate(tree, module.prefix_states(tree, any_token(len(tree.node))))

    def plain(model):
        return model(ids).logits[:, 3:-1, : module.policy.vocabulary_size]

    def taken(values):
        return values.gather(-1, actions[..., None])[..., 0]

    pairs = {
        "log_pi": taken(plain(module.policy.model).log_softmax(-1)),
        "log_ref": taken(plain(module.policy.reference_model).log_softmax(-1)),
        "q_taken": taken(plain(module.target_critic.model)),
    }
    for field, expected in pairs.items():
        torch.testing.assert_close(getattr(evaluation, field), expected, rtol=0, atol=1e-4)
    old_hidden = evaluation.tree.of_tokens(evaluation.states.old)
    unscaled = taken(module.policy.lm_head(old_hidden).log_softmax(-1))
    assert (unscaled - pairs["log_pi"]).abs().max() > 0.1
