"""Cross-fitting: an action is never evaluated by a head that was trained on it."""

import functools

import pytest
import torch

from etpo.algorithms.etpo import ETPO
from etpo.algorithms.ppo import PPO
from etpo.callbacks.credit import select, token_numbers
from etpo.errors import ConfigError
from etpo.models.critics import HeadCritic, PolicyHeadCritic, TrunkCritic
from etpo.models.prefix_tree import prefix_tree

from .conftest import ETPO_SETTINGS

CRITICS = [HeadCritic, PolicyHeadCritic]


@pytest.fixture
def build(make_policy):
    """build(critic, ...): ETPO with two heads."""

    def make(critic=HeadCritic, algorithm=ETPO, cross_fit=True, **changes):
        torch.manual_seed(0)
        sized = functools.partial(critic, hidden_size=16, cross_fit=cross_fit)
        settings = (ETPO_SETTINGS if algorithm is ETPO else {}) | changes
        return algorithm.from_config(make_policy(), sized, **settings)

    return make


def test_prefixes_of_two_folds_are_two_on_the_same_nodes():
    prompts = torch.tensor([[1, 2]] * 4)
    ids = torch.tensor([[3, 4], [3, 5], [3, 4], [6, 7]])
    inputs = prompts, torch.ones_like(prompts).bool(), ids, torch.ones_like(ids).bool()
    fold = torch.tensor([0, 1, 1, 0])
    whole, split = prefix_tree(*inputs), prefix_tree(*inputs, fold)
    assert torch.equal(whole.nodes.token, split.nodes.token)
    assert len(whole.node) == 3  # after the prompt, after 3 and after 6
    assert len(split.node) == 5
    assert not whole.fold.any()
    assert torch.equal(split.of_tokens(split.fold), fold[:, None].expand(4, 2))
    assert torch.equal(split.of_tokens(split.node), whole.of_tokens(whole.node))
    assert torch.equal(split.of_taken(split.taken), ids)


def changed_rows(module, rollout, change):
    """Rows whose advantages and returns differ after `change(module)`."""
    before = module.compute_targets(rollout)
    change(module)
    after = module.compute_targets(rollout)
    pairs = ((before.advantages, after.advantages), (before.returns, after.returns))
    return torch.stack([(one - other).abs().amax(1) > 1e-6 for one, other in pairs])


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("number", [0, 1])
def test_a_head_evaluates_the_other_fold_alone(build, letter_env, fit, critic, number):
    """Returns, the baseline and with it the advantages."""
    module = build(critic)
    data = fit(module, letter_env(4), 2, minibatch_size=32)

    def shift(module):
        with torch.no_grad():
            for parameter in module.target_critic.head[number].parameters():
                parameter += 0.1

    fold = module.folds(data.rollout)
    assert torch.equal(fold[:4], torch.tensor([0, 1, 0, 1]))
    for changed in changed_rows(module, data.rollout, shift):
        assert changed[fold != number].any()
        assert not changed[fold == number].any()


@pytest.mark.parametrize("critic", CRITICS)
def test_a_head_is_trained_on_its_fold_alone(build, letter_env, fit, critic):
    module = build(critic)
    data = fit(module, letter_env(4), 1, minibatch_size=32)
    batch = module.compute_targets(data.rollout)
    for number in (0, 1):
        rows = (batch.fold == number).nonzero()[:, 0]
        module.critic.zero_grad()
        module.critic_loss(batch.select(rows))[0].backward()
        own, other = module.critic.head[number], module.critic.head[1 - number]
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in own.parameters())
        assert all(p.grad is None or not p.grad.any() for p in other.parameters())


def test_the_credit_page_shows_the_values_of_the_objective(build, letter_env, fit):
    """Each action's by the head of the other fold."""
    module = build()
    data = fit(module, letter_env(4), 2)
    selected = [select(data.rollout, row) for row in range(4)]
    with torch.no_grad():
        before = [numbers["q"] for numbers in token_numbers(module, selected)]
        for parameter in module.target_critic.head[0].parameters():
            parameter.add_(1.0)
        after = [numbers["q"] for numbers in token_numbers(module, selected)]
    changed = [not torch.allclose(one, other) for one, other in zip(before, after, strict=True)]
    assert changed == [False, True, False, True]


def test_the_exact_term_uses_the_head_of_the_correction(build, letter_env, fit):
    """Rows of one fold have the loss of a module with the other head alone."""
    module, plain = build(), build(cross_fit=False)
    data = fit(module, letter_env(4), 2, minibatch_size=32)
    fit(plain, letter_env(4), 1)
    plain.load_state_dict(
        {n: w for n, w in module.state_dict().items() if "critic" not in n}, strict=False
    )
    batch = module.compute_targets(data.rollout)
    for number in (0, 1):
        for name in ("critic", "target_critic"):
            head = getattr(module, name).head[1 - number]
            getattr(plain, name).head.load_state_dict(head.state_dict())
        expected = plain.compute_targets(data.rollout)
        rows = (batch.fold == number).nonzero()[:, 0]
        torch.testing.assert_close(batch.returns[rows], expected.returns[rows])
        one, other = (
            each.select(rows)._replace(advantages=torch.zeros_like(each.advantages[rows]))
            for each in (batch, expected)
        )
        module.scale = plain.scale = 1.0
        losses = module.policy_loss(one)[0], plain.policy_loss(other)[0]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


def test_the_critic_is_fitted_before_the_policy_moves(build, letter_env, fit, monkeypatch):
    module = build(PolicyHeadCritic)
    calls = []
    right = ETPO.compute_targets

    def spy(self, rollout):
        before = [p.clone() for p in self.policy.trainable_parameters()]
        batch = right(self, rollout)
        calls.append((before, rollout.states is None, batch.old_log_probs.clone(), batch.returns))
        return batch

    monkeypatch.setattr(ETPO, "compute_targets", spy)
    fit(module, letter_env(4), 2, minibatch_size=32, critic_epochs=3)
    assert [first for _, first, *_ in calls] == [True, False] * 2
    for (policy, _, log_old, returns), (same, _, log_again, new) in (calls[:2], calls[2:]):
        assert all(torch.equal(one, other) for one, other in zip(policy, same, strict=True))
        torch.testing.assert_close(log_old, log_again)
        assert not torch.equal(returns, new)  # of the fitted critic
    pairs = zip(calls[0][0], calls[2][0], strict=True)
    assert not all(torch.equal(one, other) for one, other in pairs)


def test_the_policy_waits_for_the_critic(build, letter_env, fit):
    module = build(cross_fit=False, critic_warmup_iters=2)
    before = [p.clone() for p in module.policy.trainable_parameters()]
    fit(module, letter_env(4), 2)
    pairs = zip(before, module.policy.trainable_parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert any(p.any() for p in module.critic.head.value.parameters())
    fit(module, letter_env(4), 3)
    pairs = zip(before, module.policy.trainable_parameters(), strict=True)
    assert not all(torch.equal(one, other) for one, other in pairs)


def test_what_cannot_be_cross_fitted_is_refused(build, letter_env, fit):
    with pytest.raises(ConfigError, match=r"critic.cross_fit=true: allowed with PPO is false"):
        build(algorithm=PPO)
    with pytest.raises(
        ConfigError, match=r"critic.cross_fit=true: allowed are critic=frozen_trunk"
    ):
        build(TrunkCritic)
    with pytest.raises(ConfigError, match=r"critic.cross_fit=true: .*num_envs of 2 or more"):
        fit(build(), letter_env(1), 1, minibatch_size=8)
    with pytest.raises(ConfigError, match=r"rollout.critic_epochs=1: .*critic.cross_fit=true"):
        fit(build(cross_fit=False), letter_env(4), 1, critic_epochs=1)
