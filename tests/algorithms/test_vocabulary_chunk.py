"""`algorithm.logits_chunk_size`: the same annotations, losses and gradients, in bounded memory."""

import functools
import math

import pytest
import torch
from etpo.algorithms.poad import POAD
from etpo.algorithms.ppo_kl import PPOKL
from etpo.algorithms.variants import TwinETPO, WindowETPO

from etpo.algorithms.archer import ArCHer
from etpo.algorithms.etpo import ETPO
from etpo.algorithms.reinforce import GRPO
from etpo.errors import ConfigError
from etpo.models.critics import HeadCritic, LanguageModelCritic, LoraCritic, TrunkCritic
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import CompletionTemplate

LORA = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
ADAPTED = {"lora": LORA | {"target_modules": ["q_proj", "v_proj"]}}
ADAPTED_HEAD = {"lora": LORA | {"target_modules": ["q_proj", "lm_head"]}}
CHUNK = 7
# algorithm, family, critic, arguments of the policy, of the algorithm
KINDS = {
    "full critic": (ETPO, "llama", TrunkCritic, {"min_p": 0.1}, {"pessimism_threshold": 1.0}),
    "head critic": (ETPO, "llama", HeadCritic, {"temperature": 0.7}, {"pessimism_threshold": 0.5}),
    "the paper's": (ETPO, "qwen", LanguageModelCritic, {}, {"doubly_robust": False}),
    "adapters": (ETPO, "qwen", LoraCritic, ADAPTED | {"min_p": 0.1}, {}),
    "adapter on the output layer": (ETPO, "llama", HeadCritic, ADAPTED_HEAD, {}),
    "checkpointed": (ETPO, "starcoder", HeadCritic, {"gradient_checkpointing": True}, {}),
    "twins": (TwinETPO, "llama", TrunkCritic, {}, {"critic_loss": "mse"}),
    "poad": (POAD, "llama", HeadCritic, {"min_p": 0.1}, {}),
    "ppo_kl": (PPOKL, "llama", HeadCritic, {}, {}),
    "archer": (ArCHer, "llama", TrunkCritic, {"min_p": 0.1}, {}),
    "grpo": (GRPO, "qwen", None, ADAPTED, {}),
}


@pytest.fixture
def pair(checkpoint, build_algorithm, letter_env, paid, fit):
    """pair(kind): the module without and with chunks, their weights alike, and a rollout."""

    def make(kind):
        algorithm, family, critic, model, changes = KINDS[kind]
        modules = []
        for chunk in (None, CHUNK):
            torch.manual_seed(0)
            policy = functools.partial(
                LanguageModelPolicy, str(checkpoint(family)), CompletionTemplate(), **model
            )
            modules.append(
                build_algorithm(
                    algorithm, policy, critic, logits_chunk_size=chunk, max_kl=None, **changes
                )
            )
        whole, chunked = modules
        env = paid(letter_env(4), lambda action: sum(map(ord, action)) % 7 / 7)
        rollout = fit(whole, env, 1, minibatch_size=32, update_epochs=2).rollout
        for parameter in whole.critic.parameters() if whole.critic else ():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        chunked.load_state_dict(whole.state_dict())
        chunked.trainer = whole.trainer
        for module in modules:
            module.log_mean = lambda *_: None
        return whole, chunked, rollout

    return make


def move(module):
    """Takes the policy away from pi_old, the critic from its target."""
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
def test_annotations_losses_and_gradients_are_the_same(kind, pair):
    whole, chunked, rollout = pair(kind)
    batches = [module.compute_targets(rollout) for module in (whole, chunked)]
    for name in ("returns", "advantages", "features"):
        expected, found = (getattr(batch, name) for batch in batches)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert batches[0].advantages.abs().max() > 0.01
    assert chunked.rollout_metrics == pytest.approx(whole.rollout_metrics, rel=1e-3, abs=1e-4)
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
        size = module.policy.output_layer.weight.shape
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
    assert max((old - new).abs().max() for old, new in pairs) > module.policy_lr / 2
    assert not any("old" in name for name in module.state_dict())


@pytest.mark.parametrize("chunk", [0, -1, 1.5, True, "all"])
def test_bad_sizes_of_a_chunk(build_etpo, chunk):
    message = f"algorithm.logits_chunk_size={chunk}: allowed is 1 or more, an integer"
    with pytest.raises(ConfigError, match=message):
        build_etpo(logits_chunk_size=chunk)


def test_a_window_of_earlier_iterations_needs_whole_distributions(build_etpo):
    message = "algorithm.logits_chunk_size=8: allowed is null beside algorithm.window"
    with pytest.raises(ConfigError, match=message):
        build_etpo(variant=WindowETPO, window=2, logits_chunk_size=8)


def test_a_model_that_scales_its_logits_is_refused(checkpoint, build_algorithm):
    scaled = functools.partial(LanguageModelPolicy, str(checkpoint("cohere")), CompletionTemplate())
    with pytest.raises(ConfigError, match="algorithm.logits_chunk_size=8: allowed is null.*cohere"):
        build_algorithm(ETPO, scaled, HeadCritic, logits_chunk_size=8).on_fit_start()
    build_algorithm(ETPO, scaled, HeadCritic, logits_chunk_size=None).on_fit_start()
    ids = torch.tensor([[5, 6, 7]])
    policy = scaled()
    whole = policy(ids, ids > 0, ids)
    again = policy(ids, ids > 0, ids, known_features=whole.features)
    assert torch.equal(whole.log_probs, again.log_probs)
