"""Universal claims about the training functions on random token MDPs, and wrong variants of each.

A proof that no mistake can fail proves nothing: every test here is run on deliberate mistakes too.
"""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etpo.algorithms.losses import action_weights, policy_objective
from etpo.algorithms.returns import (
    expectation,
    kl_divergence,
    lambda_returns,
    soft_value,
)

from ..token_mdp_oracle import Episodes, TokenMDP
from .doubly_robust import doubly_robust_objective

EXACT = 1e-9  # float64, values of about 1
WRONG = 1e-2

seeds = st.integers(0, 2**20)
betas = st.floats(0.05, 3.0)
gammas = st.floats(0.0, 0.99)
unit = st.floats(0.0, 1.0)
shapes = st.sampled_from([(2, 3, True), (3, 2, True), (3, 2, False), (4, 2, True), (5, 1, False)])


class Case(NamedTuple):
    """A policy on a token MDP, its exact soft Q, and all its episodes."""

    mdp: TokenMDP
    log_pi: torch.Tensor
    log_ref: torch.Tensor
    q: torch.Tensor
    beta: float
    episodes: Episodes


def make_case(seed, shape, gamma, beta, horizon=1, **options):
    vocabulary_size, length, eos = shape
    mdp = TokenMDP.random(seed, vocabulary_size, length, 2, eos, gamma, **options)
    log_pi, log_ref = mdp.random_policy(seed + 1), mdp.random_policy(seed + 2)
    q, _ = mdp.evaluate(log_pi, log_ref, beta)
    return Case(mdp, log_pi, log_ref, q, beta, mdp.enumerate_episodes(horizon))


def next_values(case):
    e = case.episodes
    values = soft_value(case.log_pi, case.log_ref, case.q, case.beta)
    return values[e.next_state, e.next_prefix]


def kl_one_step_early(case):
    """KL of the prefix that was left in place of the one that was reached."""
    e = case.episodes
    kl = case.beta * kl_divergence(case.log_pi, case.log_ref)
    return next_values(case) + kl[e.next_state, e.next_prefix] - kl[e.state, e.prefix]


def policy_weight_dropped(case):
    """The mean over the vocabulary in place of the policy's."""
    e = case.episodes
    inner = case.q - case.beta * (case.log_pi - case.log_ref)
    return inner.mean(-1)[e.next_state, e.next_prefix]


def reference_dropped(case):
    """-log pi in place of -log(pi/pi_ref)."""
    e = case.episodes
    values = expectation(case.log_pi, case.q - case.beta * case.log_pi)
    return values[e.next_state, e.next_prefix]


def discounts(case):
    return case.episodes.discounts


def gamma_inside_actions(case):
    e = case.episodes
    inside = e.valid & (e.next_prefix > 0)
    return torch.where(inside, case.mdp.gamma, e.discounts)


def bootstrap_through_termination(case):
    e = case.episodes
    return torch.where(e.valid & (e.discounts == 0), case.mdp.gamma, e.discounts)


def no_bootstrap_at_truncation(case):
    e = case.episodes
    cut = e.valid & (e.next_prefix == 0) & ~e.continues
    return torch.where(cut, 0.0, e.discounts)


def bellman_error(case, lambda_, values=next_values, discounts=discounts):
    """Largest |E[G | x, w] - Q(x, w)| over what the episodes visit."""
    e = case.episodes
    q_taken = case.q[e.next_state, e.next_prefix, e.next_token]
    returns = lambda_returns(
        e.rewards, discounts(case), values(case), q_taken, lambda_, e.continues
    )
    weight = e.valid * e.probabilities(case.log_pi).unsqueeze(1)
    at = (e.state, e.prefix, e.token)
    total = torch.zeros_like(case.q).index_put(at, weight * returns, accumulate=True)
    mass = torch.zeros_like(case.q).index_put(at, weight, accumulate=True)
    visited = mass > 0
    return (total[visited] / mass[visited] - case.q[visited]).abs().max().item()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seeds, shapes, gammas, betas)
def test_token_and_action_level_optimum_are_one(seed, shape, gamma, beta):
    vocabulary_size, length, eos = shape
    mdp = TokenMDP.random(seed, vocabulary_size, length, 3, eos, gamma)
    log_ref = mdp.random_policy(seed + 1)
    by_actions, action_value = mdp.solve_actions(log_ref, beta)
    by_tokens, token_value = mdp.solve_tokens(log_ref, beta)
    torch.testing.assert_close(token_value, action_value, rtol=0, atol=1e-9)
    actions = mdp.action_log_probs(by_tokens).exp()
    torch.testing.assert_close(actions, by_actions.exp(), rtol=0, atol=1e-9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seeds, shapes, gammas, betas, unit, st.booleans())
def test_the_exact_soft_q_is_the_fixed_point_of_the_returns(
    seed, shape, gamma, beta, lambda_, to_the_end
):
    """With truncations after one action, and with episodes that run to their end."""
    options = {"acyclic": True, "horizon": 2} if to_the_end else {}
    assert bellman_error(make_case(seed, shape, gamma, beta, **options), lambda_) < EXACT


@pytest.mark.parametrize("lambda_", [0.0, 0.9, 1.0])
@pytest.mark.parametrize(
    "wrong",
    [
        {"values": kl_one_step_early},
        {"values": policy_weight_dropped},
        {"values": reference_dropped},
        {"discounts": gamma_inside_actions},
        {"discounts": bootstrap_through_termination},
        {"discounts": no_bootstrap_at_truncation},
    ],
    ids=lambda wrong: next(iter(wrong.values())).__name__,
)
def test_oracle_catches_wrong_targets(wrong, lambda_):
    for seed in range(5):
        case = make_case(seed, (3, 2, True), gamma=0.8, beta=0.3)
        assert bellman_error(case, lambda_) < EXACT
        assert bellman_error(case, lambda_, **wrong) > WRONG


def gradient_error(case, critic, objective):
    """Relative error of an objective's expected gradient against that of the exact return J."""
    e, mdp = case.episodes, case.mdp
    logits = case.log_pi.clone().requires_grad_()
    log_pi = logits.log_softmax(-1)
    exact = torch.autograd.grad(
        -mdp.regularized_return(log_pi, case.log_ref, case.beta), logits, retain_graph=True
    )[0]
    values = soft_value(case.log_pi, case.log_ref, critic, case.beta)
    returns = lambda_returns(
        e.rewards,
        e.discounts,
        values[e.next_state, e.next_prefix],
        critic[e.next_state, e.next_prefix, e.next_token],
        1.0,
        e.continues,
    )
    losses = objective(case, log_pi, critic, returns)
    weight = e.valid * action_weights(mdp.gamma, e.step.double())
    mean = (e.probabilities(case.log_pi).unsqueeze(1) * weight * losses).sum()
    gradient = torch.autograd.grad(mean, logits)[0]
    return ((gradient - exact).norm() / exact.norm()).item()


def doubly_robust(case, log_pi, critic, returns, log_ref=None):
    e = case.episodes
    at = (e.state, e.prefix)
    log_ref = case.log_ref if log_ref is None else log_ref
    errors = returns - critic[(*at, e.token)]
    return doubly_robust_objective(
        log_pi[at], log_ref[at], case.log_pi[at], critic[at], e.token, errors, case.beta
    )


def plain(case, log_pi, critic, returns):
    return policy_objective(log_pi, case.log_ref, None, critic, case.beta)[
        case.episodes.state, case.episodes.prefix
    ]


def without_the_reference(case, log_pi, critic, returns):
    return doubly_robust(case, log_pi, critic, returns, torch.zeros_like(case.log_ref))


def without_the_policy_weight(case, log_pi, critic, returns):
    e = case.episodes
    exact_term = plain(case, log_pi, critic, returns)
    cost = case.beta * (log_pi - case.log_ref) - critic
    unweighted = (log_pi * cost.detach()).mean(-1)[e.state, e.prefix]
    return doubly_robust(case, log_pi, critic, returns) - exact_term + unweighted


def ended_case(seed, gamma=0.8, beta=0.3, shape=(3, 2, True)):
    case = make_case(seed, shape, gamma, beta, horizon=2, acyclic=True)
    return case, case.mdp.random_policy(seed + 3)  # any table is a critic


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seeds, shapes, gammas, betas)
def test_the_doubly_robust_gradient_is_exact_for_any_critic(seed, shape, gamma, beta):
    case, critic = ended_case(seed, gamma, beta, shape)
    assert gradient_error(case, critic, doubly_robust) < EXACT


@pytest.mark.parametrize("wrong", [plain, without_the_reference, without_the_policy_weight])
def test_oracle_catches_wrong_gradients(wrong):
    for seed in range(5):
        case, critic = ended_case(seed)
        assert gradient_error(case, critic, doubly_robust) < EXACT
        assert gradient_error(case, critic, wrong) > WRONG
    assert gradient_error(case, case.q, plain) < EXACT  # the plain one needs the exact Q
