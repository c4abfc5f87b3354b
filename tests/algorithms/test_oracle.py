"""The consistency theorem by brute force, and training that must arrive at the exact optimum."""

import pytest
import torch

from etpo.algorithms.losses import (
    action_weights,
    critic_loss,
    policy_objective,
)
from etpo.algorithms.returns import kl_divergence, lambda_returns, soft_value

from ..token_mdp_oracle import TokenMDP
from .doubly_robust import doubly_robust_objective
from .kl_returns import kl_lambda_returns

BETA = 0.3
# vocabulary size, length, with an end token
SHAPES = [(2, 3, True), (3, 2, True), (4, 3, True), (5, 2, False), (3, 3, False), (5, 3, True)]


@pytest.mark.parametrize("beta", [0.03, 0.3, 3.0])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9, 0.99, 1.0])
def test_discount_one_inside_the_action_has_the_action_level_optimum(gamma, beta):
    for seed, (vocabulary_size, length, eos) in enumerate(SHAPES):
        mdp = TokenMDP.random(seed, vocabulary_size, length, eos=eos, gamma=gamma)
        log_ref = mdp.random_policy(seed + 100)
        by_actions, action_value = mdp.solve_actions(log_ref, beta)
        by_tokens, token_value = mdp.solve_tokens(log_ref, beta)
        torch.testing.assert_close(token_value, action_value, rtol=0, atol=1e-10)
        torch.testing.assert_close(
            mdp.action_log_probs(by_tokens).exp(), by_actions.exp(), rtol=0, atol=1e-10
        )


def restrict(mdp, log_ref, admissible):
    """Return log pi_ref [S, P, V] with the softmax of each prefix over the admissible tokens."""
    inside = torch.zeros_like(log_ref, dtype=torch.bool)
    for action, path in enumerate(mdp.tree.paths):
        for prefix, token in path:
            inside[:, prefix, token] |= admissible[:, action]
    inside |= ~inside.any(-1, keepdim=True)  # prefixes that are never reached
    return log_ref.where(inside, -1e4).log_softmax(-1)


@pytest.mark.parametrize("beta", [0.03, 0.3, 3.0])
def test_admissible_actions_have_the_action_level_optimum(beta):
    """Among them alone, with the reference's probability of each as product over its tokens."""
    for seed, (vocabulary_size, length, eos) in enumerate(SHAPES):
        mdp = TokenMDP.random(seed, vocabulary_size, length, eos=eos)
        generator = torch.Generator().manual_seed(seed)
        shape = mdp.rewards.shape
        admissible = torch.rand(shape, generator=generator) < 0.4
        admissible[:, seed % shape[1]] = True
        log_ref = restrict(mdp, mdp.random_policy(seed + 100), admissible)
        by_actions, action_value = mdp.solve_actions(log_ref, beta)
        by_tokens, token_value = mdp.solve_tokens(log_ref, beta)
        torch.testing.assert_close(token_value, action_value, rtol=0, atol=1e-10)
        found = mdp.action_log_probs(by_tokens).exp()
        torch.testing.assert_close(found, by_actions.exp(), rtol=0, atol=1e-10)
        assert not found[~admissible].any()
        # pi* of the admissible actions alone
        prior = mdp.action_log_probs(log_ref)
        energy = prior + (mdp.rewards + mdp._continuation @ action_value) / beta
        expected = energy.where(admissible, -torch.inf).softmax(-1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(prior.exp().sum(-1), torch.ones(shape[0]).double())


@pytest.mark.parametrize(("gamma", "bound"), [(0.5, 0.2), (0.9, 0.1), (0.99, 0.01)])
def test_discounting_every_token_changes_the_optimum_of_longer_actions(gamma, bound):
    def distance(seed, length):
        mdp = TokenMDP.random(seed, length=length, gamma=gamma)
        log_ref = mdp.random_policy(seed + 100)
        by_actions, _ = mdp.solve_actions(log_ref, BETA)
        naive, _ = mdp.solve_tokens(log_ref, BETA, token_discount=gamma)
        variation = (mdp.action_log_probs(naive).exp() - by_actions.exp()).abs().sum(-1) / 2
        return variation.max().item()

    assert torch.tensor([distance(seed, 3) for seed in range(11)]).median() > bound
    assert max(distance(seed, 1) for seed in range(3)) < 1e-10


def divergence(mdp, log_optimum, log_pi):
    """KL(pi* || pi) of whole actions, the largest over states."""
    log_optimum, log_pi = mdp.action_log_probs(log_optimum), mdp.action_log_probs(log_pi)
    return kl_divergence(log_optimum, log_pi).max().item()


@pytest.mark.parametrize("eta", [0.0, 0.3])
@pytest.mark.parametrize(("vocabulary_size", "length", "eos"), [(3, 2, True), (2, 3, False)])
def test_policy_objective_with_exact_q_trains_to_the_optimum(vocabulary_size, length, eos, eta):
    mdp = TokenMDP.random(0, vocabulary_size, length, eos=eos)
    log_ref = mdp.random_policy(1)
    log_optimum, _ = mdp.solve_tokens(log_ref, BETA)
    assert divergence(mdp, log_optimum, log_ref) > 0.5
    logits = log_ref.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.2)
    for _ in range(150):
        log_old = logits.detach().log_softmax(-1)
        q, _ = mdp.evaluate(log_old, log_ref, BETA)
        visits = mdp.visitation(log_old)
        for _ in range(4):  # epochs on one policy's data
            log_pi = logits.log_softmax(-1)
            loss = visits * policy_objective(log_pi, log_ref, log_old, q, BETA, eta)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
    assert divergence(mdp, log_optimum, logits.detach().log_softmax(-1)) < 1e-3


def returns_of(form, episodes, log_pi, log_ref, q, lambda_):
    e = episodes
    v = soft_value(log_pi, log_ref, q, BETA)[e.next_state, e.next_prefix]
    if form == "kl":
        kl = kl_divergence(log_pi, log_ref)[e.next_state, e.next_prefix]
        return kl_lambda_returns(e.rewards, e.discounts, v, kl, lambda_, BETA, e.continues)
    q_taken = q[e.next_state, e.next_prefix, e.next_token]
    return lambda_returns(e.rewards, e.discounts, v, q_taken, lambda_, e.continues)


def train(mdp, log_ref, episodes, objective, form, lambda_, iterations=400):
    """Actor and critic from nothing but episodes: all of them, weighted by their probability.

    Policy starts at the reference, Q at 0. Per iteration the critic takes four steps on the
    targets of its Polyak average, the policy one. Returns log pi.
    """
    e = episodes
    at, taken = (e.state, e.prefix), (e.state, e.prefix, e.token)
    weight = e.valid * action_weights(mdp.gamma, e.step.double())
    logits = log_ref.clone().requires_grad_()
    critic = torch.zeros_like(log_ref).requires_grad_()
    target = torch.zeros_like(log_ref)
    policy_optimizer = torch.optim.Adam([logits], lr=0.2)
    critic_optimizer = torch.optim.Adam([critic], lr=0.1)
    for _ in range(iterations):
        log_old = logits.detach().log_softmax(-1)
        probability = e.probabilities(log_old).unsqueeze(1)
        for _ in range(4):
            returns = returns_of(form, e, log_old, log_ref, target, lambda_)
            loss = probability * critic_loss(critic[taken], returns, e.valid, "huber", 10.0)
            critic_optimizer.zero_grad()
            loss.sum().backward()
            critic_optimizer.step()
            target.lerp_(critic.detach(), 0.5)
        log_pi, q = logits.log_softmax(-1), critic.detach()
        if objective == "doubly_robust":
            errors = returns_of(form, e, log_old, log_ref, q, lambda_) - q[taken]
            loss = doubly_robust_objective(
                log_pi[at],
                log_ref[at],
                log_old[at],
                q[at],
                e.token,
                errors,
                BETA,
                0.1,
                (0.2, "ratio"),
            )
        else:
            loss = policy_objective(log_pi, log_ref, log_old, q, BETA)[at]
        policy_optimizer.zero_grad()
        (probability * weight * loss).sum().backward()
        policy_optimizer.step()
    return logits.detach().log_softmax(-1)


@pytest.mark.parametrize(
    ("objective", "form", "lambda_"),
    [
        ("plain", "q", 0.0),
        ("plain", "kl", 1.0),
        ("doubly_robust", "q", 0.9),
        ("doubly_robust", "q", 1.0),
    ],
)
def test_actor_critic_trains_to_the_optimum(objective, form, lambda_):
    mdp = TokenMDP.random(1, num_states=2, acyclic=True)
    log_ref = mdp.random_policy(2)
    log_optimum, _ = mdp.solve_tokens(log_ref, BETA)
    assert divergence(mdp, log_optimum, log_ref) > 0.5
    episodes = mdp.enumerate_episodes(horizon=2)
    log_pi = train(mdp, log_ref, episodes, objective, form, lambda_)
    assert divergence(mdp, log_optimum, log_pi) < 1e-3


def test_actor_critic_bootstraps_across_truncations_to_the_optimum():
    mdp = TokenMDP.random(3, num_states=2)  # cyclic: every episode is cut after one action
    log_ref = mdp.random_policy(2)
    log_optimum, _ = mdp.solve_tokens(log_ref, BETA)
    episodes = mdp.enumerate_episodes(horizon=1)
    log_pi = train(mdp, log_ref, episodes, "doubly_robust", "q", 1.0)
    assert divergence(mdp, log_optimum, log_pi) < 1e-3


def test_actor_critic_with_a_discount_at_every_token_misses_the_optimum():
    mdp = TokenMDP.random(1, num_states=2, acyclic=True, gamma=0.5)
    log_ref = mdp.random_policy(2)
    log_optimum, _ = mdp.solve_tokens(log_ref, BETA)
    naive_optimum, _ = mdp.solve_tokens(log_ref, BETA, token_discount=mdp.gamma)
    episodes = mdp.enumerate_episodes(horizon=2)
    inside = episodes.valid & (episodes.discounts == 1)
    episodes = episodes._replace(
        discounts=torch.where(inside, mdp.gamma, episodes.discounts),
        step=torch.zeros_like(episodes.step),  # plain weights: any will do for the fixed point
    )
    log_pi = train(mdp, log_ref, episodes, "plain", "q", 0.0)
    assert divergence(mdp, naive_optimum, log_pi) < 1e-3
    assert divergence(mdp, log_optimum, log_pi) > 1e-2
