"""Replayed actions and lambda by level on random token MDPs, and wrong variants of each.

mu samples the episodes, pi is evaluated: all means are over every episode, weighted by its
probability under mu.
"""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from etpo.algorithms.losses import clipped_surrogate, policy_objective
from etpo.algorithms.returns import (
    generalized_advantages,
    kl_penalized_rewards,
    lambda_returns,
    soft_value,
    traces,
)

from ..token_mdp_oracle import Episodes, TokenMDP

EXACT = 1e-9  # float64, values of about 1
WRONG = 1e-2

seeds = st.integers(0, 2**20)
unit = st.floats(0.0, 1.0)
betas = st.floats(0.05, 3.0)
shapes = st.sampled_from([(2, 3, True), (3, 2, True), (3, 2, False), (4, 2, True)])


class Case(NamedTuple):
    """Policies pi and mu on a token MDP, the exact soft Q of pi, and all episodes."""

    mdp: TokenMDP
    log_pi: torch.Tensor
    log_mu: torch.Tensor
    log_ref: torch.Tensor
    q: torch.Tensor
    beta: float
    e: Episodes

    @property
    def taken(self):
        return self.e.state, self.e.prefix, self.e.token

    @property
    def at(self):
        return self.e.state, self.e.prefix

    @property
    def next(self):
        return self.e.next_state, self.e.next_prefix

    @property
    def ratios(self):
        """pi/mu of the taken tokens, 1 on padding."""
        ratio = (self.log_pi - self.log_mu)[self.taken].exp()
        return torch.where(self.e.valid, ratio, 1.0)

    @property
    def last(self):
        """True at the last token of an action."""
        return self.e.valid & (self.e.next_prefix == 0)


def make_case(seed, shape=(3, 2, True), beta=0.3, distance=1.0, gamma=0.8):
    """`distance` scales the difference of the logits of mu and pi."""
    vocabulary_size, length, eos = shape
    mdp = TokenMDP.random(seed, vocabulary_size, length, 2, eos, gamma, acyclic=True)
    log_pi, log_ref = mdp.random_policy(seed + 1), mdp.random_policy(seed + 2)
    log_mu = (log_pi + distance * mdp.random_policy(seed + 3)).log_softmax(-1)
    q, _ = mdp.evaluate(log_pi, log_ref, beta)
    return Case(mdp, log_pi, log_mu, log_ref, q, beta, mdp.enumerate_episodes(2))


def soft_returns(case, q, trace, policy=None):
    """Retrace with the values of a critic `q` under `policy`, pi by default."""
    policy = case.log_pi if policy is None else policy
    values = soft_value(policy, case.log_ref, q, case.beta)
    return lambda_returns(
        case.e.rewards,
        case.e.discounts,
        values[case.next],
        q[(*case.next, case.e.next_token)],
        trace,
        case.e.continues,
    )


def conditional_mean(case, values):
    """E_mu[values | x, w] [S, P, V], and where it exists."""
    weight = case.e.valid * case.e.probabilities(case.log_mu).unsqueeze(1)
    total = torch.zeros_like(case.q).index_put(case.taken, weight * values, accumulate=True)
    mass = torch.zeros_like(case.q).index_put(case.taken, weight, accumulate=True)
    return total / mass, mass > 0


def distance_to_q(case, returns):
    """Largest |E_mu[returns | x, w] - Q^pi(x, w)|."""
    mean, visited = conditional_mean(case, returns)
    return (mean - case.q)[visited].abs().max().item()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seeds, shapes, betas, unit, unit)
def test_q_of_pi_is_the_fixed_point_with_data_of_another_policy(seed, shape, beta, inside, between):
    case = make_case(seed, shape, beta)
    trace = traces(case.last, inside, between, case.ratios)
    assert distance_to_q(case, soft_returns(case, case.q, trace)) < EXACT
    # annotated by the policy that sampled: V, and with it the fixed point, is another one
    assert distance_to_q(case, soft_returns(case, case.q, trace, case.log_mu)) > 1e-6


def test_oracle_catches_values_of_the_policy_that_sampled():
    for seed in range(5):
        case = make_case(seed)
        trace = traces(case.last, 0.9, 0.9, case.ratios)
        assert distance_to_q(case, soft_returns(case, case.q, trace)) < EXACT
        assert distance_to_q(case, soft_returns(case, case.q, trace, case.log_mu)) > WRONG


def repeated(case, trace, sweeps):
    """Q after `sweeps` exact updates from 0, the largest error over what mu visits."""
    q = torch.zeros_like(case.q)
    for _ in range(sweeps):
        mean, visited = conditional_mean(case, soft_returns(case, q, trace))
        q = torch.where(visited, mean, q)
    return (q - case.q)[visited].abs().max().item()


def test_updates_with_truncated_ratios_arrive_at_q_of_pi():
    for seed in range(5):
        case = make_case(seed, distance=2.0)
        trace = traces(case.last, 1.0, 1.0, case.ratios)
        assert repeated(case, trace, sweeps=8) < EXACT
        assert 0 < trace.min() < trace.max() <= 1


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seeds, shapes, betas, unit)
def test_the_value_of_pi_is_the_fixed_point_of_weighted_advantages(seed, shape, beta, lambda_):
    """E_mu[A | x, w] = Q - V - beta log(pi/pi_ref), and V + ratio A has the mean V."""
    case = make_case(seed, shape, beta)
    advantages, value = weighted_advantages(case, lambda_ * whole_returns(case))
    expected = case.q - value.unsqueeze(-1) - case.beta * (case.log_pi - case.log_ref)
    mean, visited = conditional_mean(case, advantages)
    assert (mean - expected)[visited].abs().max() < EXACT
    assert value_error(case, advantages, case.ratios) < EXACT


def weighted_advantages(case, trace):
    value = soft_value(case.log_pi, case.log_ref, case.q, case.beta)
    taken = (table[case.taken] for table in (case.log_pi, case.log_ref))
    advantages = generalized_advantages(
        kl_penalized_rewards(case.e.rewards, *taken, case.beta, case.e.valid),
        case.e.discounts,
        value[case.at],
        value[case.next],
        trace,
        case.e.continues,
    )
    return advantages, value


def value_error(case, advantages, ratios):
    """Largest |E_mu[ratio A | x]|, which moves a value that is exact."""
    weight = case.e.valid * case.e.probabilities(case.log_mu).unsqueeze(1)
    moved = torch.zeros_like(case.q[..., 0]).index_put(
        case.at, weight * ratios * advantages, accumulate=True
    )
    return moved.abs().max().item()


def test_oracle_catches_advantages_without_weight():
    for seed in range(5):
        case = make_case(seed)
        advantages, _ = weighted_advantages(case, whole_returns(case))
        ones = torch.ones_like(case.ratios)
        assert value_error(case, advantages, case.ratios) < EXACT
        assert value_error(case, advantages, ones) > WRONG
        assert value_error(case, weighted_advantages(case, ones)[0], case.ratios) > 1e-3


def test_truncated_ratios_move_values_but_not_q():
    """Retrace keeps Q^pi (above); the fixed point of V-trace is another policy's value."""
    for seed in range(5):
        case = make_case(seed)
        trace = traces(case.last, 1.0, 1.0, case.ratios)
        advantages, _ = weighted_advantages(case, trace)
        assert value_error(case, advantages, case.ratios.clamp(max=1)) > WRONG


def gradient_error(case, critic, weights, trace, policy=None):
    """Relative error of the doubly robust gradient at the prefixes that mu visits.

    The exact one is that of -E_pi[Q^pi - beta log(pi/pi_ref)] at each of them, with Q^pi constant.

    policy: of the exact term and the values in place of pi.
    """
    e = case.e
    logits = case.log_pi.clone().requires_grad_()
    log_pi = logits.log_softmax(-1)
    exact = policy_objective(log_pi, case.log_ref, None, case.q, case.beta)
    errors = soft_returns(case, critic, trace, policy) - critic[case.taken]
    term = policy_objective(log_pi, case.log_ref, None, critic, case.beta)
    correction = clipped_surrogate(
        log_pi[case.taken], case.log_pi[case.taken], weights * errors, None
    )
    probability = e.valid * e.probabilities(case.log_mu).unsqueeze(1)
    found, expected = (
        torch.autograd.grad((probability * loss).sum(), logits, retain_graph=True)[0]
        for loss in (term[case.at] + correction, exact[case.at])
    )
    return ((found - expected).norm() / expected.norm()).item()


def whole_returns(case):
    """Traces with ratios that are not truncated, and lambda = 1."""
    return pad(case.ratios[:, 1:], (0, 1), value=1.0)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seeds, shapes, betas)
def test_the_weighted_gradient_is_exact_for_any_critic(seed, shape, beta):
    case = make_case(seed, shape, beta)
    critic = case.mdp.random_policy(seed + 4)
    assert gradient_error(case, critic, case.ratios, whole_returns(case)) < EXACT


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seeds, shapes, betas, unit, st.floats(0.2, 2.0))
def test_truncation_costs_nothing_with_an_exact_critic(seed, shape, beta, lambda_, limit):
    case = make_case(seed, shape, beta)
    trace = traces(case.last, lambda_, lambda_, case.ratios)
    assert gradient_error(case, case.q, case.ratios.clamp(max=limit), trace) < EXACT


def test_truncation_costs_less_the_closer_the_policies_are():
    for seed in range(5):
        found = []
        for distance in (0.0, 0.1, 0.3, 1.0):
            case = make_case(seed, distance=distance)
            critic = case.mdp.random_policy(seed + 4)
            trace = traces(case.last, 1.0, 1.0, case.ratios)
            found.append(gradient_error(case, critic, case.ratios.clamp(max=1), trace))
        assert found[0] < EXACT
        assert found == sorted(found)
        assert found[1] < 0.3 * found[3]


def test_oracle_catches_gradients_without_weight_and_of_an_old_policy():
    for seed in range(5):
        case = make_case(seed)
        critic = case.mdp.random_policy(seed + 4)
        trace, ones = whole_returns(case), torch.ones_like(case.ratios)
        assert gradient_error(case, critic, case.ratios, trace) < EXACT
        assert gradient_error(case, critic, ones, trace) > WRONG
        # pi_old := mu: no ratio differs from 1, and V is that of mu
        assert gradient_error(case, critic, ones, ones, case.log_mu) > WRONG
        assert gradient_error(case, critic, case.ratios, ones) > WRONG, "returns without ratios"


@pytest.mark.parametrize(("inside", "between"), [(1.0, 0.0), (1.0, 0.4), (1.0, 1.0)])
def test_lambda_one_inside_an_action_needs_values_at_its_start_only(inside, between):
    for seed in range(5):
        case = make_case(seed, (3, 3, True), distance=0.0)
        assert level_error(case, seed, traces(case.last, inside, between, case.ratios)) < EXACT


def level_error(case, seed, trace):
    """Error of the returns with a critic that is right before the first token only."""
    critic = case.mdp.random_policy(seed + 4)
    values = soft_value(case.log_pi, case.log_ref, critic, case.beta)
    exact = soft_value(case.log_pi, case.log_ref, case.q, case.beta)
    values[:, 0], critic[:, 0] = exact[:, 0], case.q[:, 0]
    returns = lambda_returns(
        case.e.rewards,
        case.e.discounts,
        values[case.next],
        critic[(*case.next, case.e.next_token)],
        trace,
        case.e.continues,
    )
    return distance_to_q(case, returns)


def test_oracle_catches_swapped_and_shifted_levels():
    for seed in range(5):
        case = make_case(seed, (3, 3, True), distance=0.0)
        shifted = pad(case.last[:, 1:], (0, 1))  # one token early
        assert level_error(case, seed, traces(case.last, 1.0, 0.4, case.ratios)) < EXACT
        assert level_error(case, seed, traces(case.last, 0.4, 1.0, case.ratios)) > WRONG
        assert level_error(case, seed, traces(shifted, 1.0, 0.4, case.ratios)) > WRONG
