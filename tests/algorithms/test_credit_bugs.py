"""Known mistakes of credit assignment: each is caught, and the right variant is exact.

docs/credit_bugs.md lists where they are known from, with those that other tests catch.
"""

import pytest
import torch

from etpo.algorithms.losses import k3
from etpo.algorithms.returns import (
    discounted_returns,
    generalized_advantages,
    kl_divergence,
    kl_penalized_rewards,
    lambda_returns,
    soft_value,
)
from etpo.rollout.trajectories import (
    from_trajectories,
    next_values,
    shifted,
    to_trajectories,
    trajectory_steps,
)

from ..by_token import actions_of
from .doubly_robust import doubly_robust_objective
from .enumerated_gradient import EXACT, SEEDS, WRONG, EnumeratedGradient
from .test_oracle_properties import bellman_error, make_case
from .test_oracle_properties import next_values as values_after


def next_action_kl(case):
    """Return the value of a prefix with the KL at the same prefix of the next action."""
    e, kl = case.episodes, case.beta * kl_divergence(case.log_pi, case.log_ref)
    last = e.valid.sum(1, keepdim=True) - 1
    following = e.next_state.gather(1, last)
    moved = kl[e.next_state, e.next_prefix] - kl[following, e.next_prefix]
    return values_after(case) + torch.where(e.valid & (e.next_prefix > 0), moved, 0.0)


@pytest.mark.parametrize("lambda_", [0.0, 1.0])
def test_the_kl_of_the_next_action_is_caught(lambda_):
    for seed in SEEDS:
        case = make_case(seed, (3, 2, True), gamma=0.8, beta=0.3)
        assert bellman_error(case, lambda_) < EXACT
        assert bellman_error(case, lambda_, values=next_action_kl) > WRONG


def summed(case):
    return case.weight


def averaged_over_the_action(case):
    e = case.e
    of_action = (e.step[:, :, None] == e.step[:, None, :]) & e.valid[:, None]
    return case.weight / of_action.sum(2)


def averaged_over_the_batch(case):
    """Divide by the number of tokens of both episodes, which depends on the actions."""
    lengths = case.e.valid.sum(1).double()
    return case.weight * case.expectation(1 / (lengths[:, None] + lengths))[:, None]


def without_the_end_token(case):
    return case.weight * (case.e.token != case.mdp.vocabulary_size - 1)


def without_gamma_to_the_t(case):
    return case.e.valid.double()


@pytest.mark.parametrize(
    "wrong",
    [
        averaged_over_the_action,
        averaged_over_the_batch,
        without_the_end_token,
        without_gamma_to_the_t,
    ],
)
def test_another_sum_over_tokens_is_caught(wrong):
    for seed in SEEDS:
        case = EnumeratedGradient(seed, length=3, num_states=2, gamma=0.5)
        assert case.error(case.credited(case.returns, summed(case))) < EXACT
        assert case.misdirection(case.credited(case.returns, wrong(case))) > WRONG


def penalized_returns(case):
    e = case.e
    rewards = kl_penalized_rewards(
        e.rewards, case.log_old[case.taken], case.log_ref[case.taken], case.beta, e.valid
    )
    return discounted_returns(rewards, e.discounts, e.continues)


def k1_in_the_loss(case):
    return (case.log_pi - case.log_ref)[case.taken]


def k3_in_the_loss(case):
    return k3(case.log_pi[case.taken], case.log_ref[case.taken])


def exact_kl_in_the_loss(case):
    return kl_divergence(case.log_pi, case.log_ref)[case.at]


def gradient_with(case, kl):
    """Return the gradient with the returns of the rewards alone and a KL in the loss."""
    reinforce = -case.returns * case.log_pi[case.taken]
    return case.mean_gradient(reinforce + case.beta * kl(case))


@pytest.mark.parametrize("wrong", [k1_in_the_loss, k3_in_the_loss, exact_kl_in_the_loss])
def test_a_kl_in_the_loss_is_caught(wrong):
    """It lacks the KL of later tokens; of single tokens the exact KL alone has the gradient."""
    for seed in SEEDS:
        case = EnumeratedGradient(seed, length=2, beta=0.5)
        assert case.error(case.credited(penalized_returns(case))) < EXACT
        assert case.misdirection(gradient_with(case, wrong)) > WRONG
        single = EnumeratedGradient(seed, num_states=1, beta=0.5)
        assert single.error(single.credited(penalized_returns(single))) < EXACT
        right = wrong is exact_kl_in_the_loss
        assert (single.error(gradient_with(single, wrong)) < EXACT) is right


def robust_gradient(case, critics):
    """Return the doubly robust gradient with a critic [E, S, P, V] per episode, lambda 1."""
    e, row = case.e, torch.arange(len(case.e.state))[:, None]
    values = soft_value(case.log_old, case.log_ref, critics, case.beta)
    following = (row, e.next_state, e.next_prefix)
    returns = lambda_returns(
        e.rewards,
        e.discounts,
        values[following],
        critics[(*following, e.next_token)],
        1.0,
        e.continues,
    )
    at, log_pi = (row, *case.at), case.log_pi[case.at]
    return case.mean_gradient(
        doubly_robust_objective(
            log_pi,
            case.log_ref[case.at],
            case.log_old[case.at],
            critics[at],
            e.token,
            returns - critics[(*at, e.token)],
            case.beta,
        )
    )


@pytest.mark.parametrize("step", [0.5, 1.0])
def test_a_critic_of_the_same_batch_is_caught(step):
    """Fit it by `step` to the returns of its episode before the advantages are computed."""
    for seed in SEEDS:
        case = EnumeratedGradient(seed, length=2, beta=0.3)
        earlier = case.mdp.random_policy(seed + 3).expand(len(case.e.state), -1, -1, -1)
        assert case.error(robust_gradient(case, earlier)) < EXACT
        valid = case.e.valid.nonzero()
        at = (valid[:, 0], *(x[case.e.valid] for x in case.taken))
        fitted = earlier.clone()
        fitted[at] += step * (penalized_returns(case)[case.e.valid] - earlier[at])
        assert case.misdirection(robust_gradient(case, fitted)) > WRONG


GAMMA, LAMBDA = 0.9, 0.8
# one episode as one row: action, observation, action; the third token is forced and the second
# action is cut by its token limit, so that it has no end token
DRAWN = torch.tensor([True, True, False, True, False, False, True, True, True])
PLACES = torch.tensor([[0, 1, 2, 3], [6, 7, 8, -1]])  # in that row, of the tokens of both actions
REWARDS = torch.tensor([2.0, 3.0])
VALUES = torch.tensor([0.1, 0.5, 9.0, -0.3, 7.0, -8.0, 0.2, 0.8, -0.4])


def credit_of_steps():
    """Return the advantages of the drawn tokens, as the algorithms with a critic compute them."""
    ids = torch.zeros_like(PLACES)
    actions = actions_of(
        ids,
        ids == 0,
        ids,
        PLACES >= 0,
        step_mask=(PLACES >= 0) & DRAWN[PLACES],
        rewards=REWARDS,
        terminated=torch.tensor([False, True]),
        step=torch.arange(2),
    )
    steps = trajectory_steps(actions, actions.step_mask, 1, GAMMA)
    values = to_trajectories(VALUES[PLACES], steps.layout)
    following = next_values(steps, values, torch.zeros(2))
    packed = generalized_advantages(
        steps.rewards, steps.discounts, values, following, LAMBDA, steps.continues
    )
    return from_trajectories(packed, steps.layout, like=VALUES[PLACES])[actions.step_mask]


def credit_of_the_row(continues, following):
    """Return the advantages of the drawn tokens with every token of the row as a step."""
    rewards, discounts = torch.zeros_like(VALUES), torch.ones_like(VALUES)
    rewards[[3, 8]], discounts[[3, 8]] = REWARDS, torch.tensor([GAMMA, 0.0])
    row = (x[None] for x in (rewards, discounts, VALUES, following))
    return generalized_advantages(*row, LAMBDA, continues[None])[0, DRAWN]


def observations_as_steps():
    return credit_of_the_row(torch.arange(9) < 8, shifted(VALUES[None])[0])


def reset_before_observations():
    follows = torch.cat([DRAWN[1:], torch.tensor([False])])
    return credit_of_the_row(follows, torch.where(follows, shifted(VALUES[None])[0], 0.0))


def test_rewards_reach_the_tokens_before_an_observation():
    """Advantages of the six drawn tokens, summed from the errors after each."""
    values = [*VALUES[DRAWN].tolist(), 0.0]
    rewards, discounts = [0, 0, 2, 0, 0, 3], [1, 1, GAMMA, 1, 1, 0]
    expected = []
    for first in range(6):
        total, factor = 0.0, 1.0
        for k in range(first, 6):
            error = rewards[k] + discounts[k] * values[k + 1] - values[k]
            total, factor = total + factor * error, factor * LAMBDA * discounts[k]
        expected.append(total)
    assert credit_of_steps().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("wrong", [observations_as_steps, reset_before_observations])
def test_observations_in_one_row_with_actions_are_caught(wrong):
    assert (wrong() - credit_of_steps()).abs().max() > 0.1
