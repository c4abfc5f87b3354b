"""Baselines that keep the policy gradient, and baselines that depend on the action and change it.

A batch has two independent episodes of a small MDP, in which the policy decides when an episode
ends. Expected gradients are sums over all pairs. docs/credit_bugs.md lists where the wrong ones are
known from.
"""

import pytest
import torch

from etpo.algorithms.baselines import (
    Groups,
    group_standardized,
    mean_of_other_episodes,
)
from etpo.algorithms.returns import (
    discounted_returns,
)

from .enumerated_gradient import EXACT, SEEDS, WRONG, EnumeratedGradient


def rows(case):
    """Return masks [E, E, K, K]: tokens of the other episode, and of one's own."""
    e, count = case.e, len(case.e.state)
    other = e.valid[:, None, :, None] & e.valid[None, :, None, :]
    own = e.valid[:, :, None] & e.valid[:, None, :]
    return other, own[:, None].expand(count, count, -1, -1)


def mean_return(case, other, own):
    """Average the returns over masks [E, E, K, K] of both episodes; 0 over none."""
    total = (other * case.returns[None, :, None, :]).sum(-1)
    total = total + (own * case.returns[:, None, None, :]).sum(-1)
    return total / (other.sum(-1) + own.sum(-1)).clamp(min=1)


def same(values):
    """Return masks [E, E, K, K] and [E, 1, K, K] of tokens with equal values [E, K]."""
    other = values[:, None, :, None] == values[None, :, None, :]
    own = values[:, None, :, None] == values[:, None, None, :]
    return other, own


def others_at_the_observation(case):
    other, own = (a & b for a, b in zip(rows(case), same(case.e.state), strict=True))
    return case.returns[:, None] - mean_return(case, other, own & False)


def others_of_the_turn(case):
    other, own = (a & b for a, b in zip(rows(case), same(case.e.step), strict=True))
    return case.returns[:, None] - mean_return(case, other, own & False)


def turn_index_with_its_own_return(case):
    other, own = (a & b for a, b in zip(rows(case), same(case.e.step), strict=True))
    return case.returns[:, None] - mean_return(case, other, own)


def observation_with_its_own_return(case):
    other, own = (a & b for a, b in zip(rows(case), same(case.e.state), strict=True))
    return case.returns[:, None] - mean_return(case, other, own)


def rewards_centred_by_turn_index(case):
    """Subtract the other episode's reward of the same turn from every reward of this one."""
    e, (other, _) = case.e, rows(case)
    reward = (other & same(e.step)[0]) * e.rewards[None, :, None, :]
    centred = (e.rewards[:, None] - reward.sum(-1)) * e.valid[:, None]
    pairs = [discounted_returns(x, e.discounts, e.continues) for x in centred.unbind(1)]
    return torch.stack(pairs, dim=1)


def all_other_actions(case):
    """Subtract the mean of all other actions; later ones of the episode depend on this one."""
    other, own = rows(case)
    own = own & ~torch.eye(own.shape[-1], dtype=torch.bool)
    return case.returns[:, None] - mean_return(case, other, own)


def mean_of_the_batch(case):
    return case.returns[:, None] - mean_return(case, *rows(case))


def standardized_over_the_batch(case):
    """Whiten: subtract the mean of all tokens and divide by their deviation."""
    other, own = rows(case)
    squares = (other * case.returns.square()[None, :, None, :]).sum(-1)
    squares = squares + (own * case.returns.square()[:, None, None, :]).sum(-1)
    mean = mean_return(case, other, own)
    variance = squares / (other.sum(-1) + own.sum(-1)).clamp(min=1) - mean.square()
    return (case.returns[:, None] - mean) / (variance.clamp(min=0).sqrt() + 1e-4)


@pytest.mark.parametrize("right", [others_at_the_observation, others_of_the_turn])
def test_a_baseline_of_other_episodes_keeps_the_gradient(right):
    """It is independent of the action, and 0 where no other episode came."""
    for seed in SEEDS:
        case = EnumeratedGradient(seed)
        assert case.error(case.credited(case.returns)) < EXACT
        credit = case.expectation(right(case))
        assert (credit - case.returns)[case.e.valid].abs().max() > 1e-3
        assert case.error(case.credited(credit)) < EXACT


@pytest.mark.parametrize(
    "wrong",
    [
        turn_index_with_its_own_return,
        observation_with_its_own_return,
        rewards_centred_by_turn_index,
        all_other_actions,
        mean_of_the_batch,
        standardized_over_the_batch,
    ],
)
def test_a_baseline_that_depends_on_the_action_is_caught(wrong):
    """The policy decides how many turns its episode has, and what it earns in them."""
    for seed in SEEDS:
        case = EnumeratedGradient(seed)
        gradient = case.credited(case.expectation(wrong(case)))
        assert case.misdirection(gradient) > WRONG


def credit_of_groups(case, advantages, size=3):
    """Return the expected advantage [S, A] of an action in a group of `size` on one prompt."""
    rewards, pi = case.mdp.rewards, case.log_old[:, 0].exp()
    credit, group = torch.zeros_like(rewards), torch.zeros(size, dtype=torch.long)
    actions = torch.arange(rewards.shape[1])
    for state in range(len(rewards)):
        for drawn in torch.cartesian_prod(*[actions] * size):
            chance = pi[state, drawn[1:]].prod()
            credit[state, drawn[0]] += chance * advantages(rewards[state, drawn], group)[0]
    return credit


def others_of_the_group(returns, group):
    rows = torch.arange(len(returns))
    return returns - mean_of_other_episodes(returns, Groups(group, rows, rows, group), group)


def test_the_standard_deviation_of_groups_is_caught():
    """It weights prompts by the spread of their rewards; one's own part in the mean is a scale."""
    for seed in SEEDS:
        case = EnumeratedGradient(seed, gamma=0.0)

        def gradient(advantages, case=case):
            credit = credit_of_groups(case, advantages)
            return case.credited(credit[case.e.state, case.e.token])

        right = gradient(others_of_the_group)
        assert case.error(right) < EXACT
        with_own = gradient(lambda returns, group: returns - returns.mean())
        torch.testing.assert_close(with_own, case.exact * 2 / 3)
        assert case.misdirection(gradient(group_standardized)) > WRONG
