"""The oracle against enumeration, closed forms and optimality conditions: float64 throughout."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from etpo.environments.token_mdp import token_tree

from ..token_mdp_oracle import TokenMDP

BETA = 0.3


def spelled(tree):
    return {tuple(token for _, token in path) for path in tree.paths}


def test_tree_lists_every_action_and_prefix_by_hand():
    # tokens 0, 1 and the end token 2; at most two of them
    tree = token_tree(vocabulary_size=3, length=2, eos=True)
    assert spelled(tree) == {(2,), (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)}
    assert tree.child.tolist() == [[1, 2, -1], [-1, -1, -1], [-1, -1, -1]]
    assert [(level.start, level.stop) for level in tree.levels] == [(0, 1), (1, 3)]


def test_tree_of_fixed_length_has_all_products():
    tree = token_tree(vocabulary_size=2, length=3, eos=False)
    assert len(spelled(tree)) == len(tree.paths) == 2**3
    assert tree.child.tolist()[:3] == [[1, 2], [3, 4], [5, 6]]
    assert all(tree.action[path[-1]] == number for number, path in enumerate(tree.paths))


def test_action_probabilities_sum_to_one():
    mdp = TokenMDP.random(0, vocabulary_size=4, length=3)
    total = mdp.action_log_probs(mdp.random_policy(1)).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("seed", range(3))
def test_evaluation_and_visitation_agree_with_every_enumerated_episode(seed):
    mdp = TokenMDP.random(seed, acyclic=True)
    log_pi, log_ref = mdp.random_policy(seed + 10), mdp.random_policy(seed + 20)
    e = mdp.enumerate_episodes(horizon=3)
    weight = e.probabilities(log_pi)
    assert weight.sum().item() == pytest.approx(1, abs=1e-12)

    at = (e.state, e.prefix, e.token)
    discount = e.valid * mdp.gamma ** e.step.double()
    gains = discount * (e.rewards - BETA * (log_pi - log_ref)[at])
    by_enumeration = (weight * gains.sum(1)).sum()
    by_solver = mdp.regularized_return(log_pi, log_ref, BETA)
    assert by_solver.item() == pytest.approx(by_enumeration.item(), abs=1e-12)

    visits = torch.zeros_like(log_pi[..., 0])
    visits.index_put_((e.state, e.prefix), weight.unsqueeze(1) * discount, accumulate=True)
    torch.testing.assert_close(mdp.visitation(log_pi), visits, rtol=0, atol=1e-12)


def test_truncated_episodes_with_the_exact_bootstrap_give_the_value_of_a_cyclic_mdp():
    mdp = TokenMDP.random(3, num_states=2, gamma=0.95)
    log_pi, log_ref = mdp.random_policy(1), mdp.random_policy(2)
    _, value = mdp.evaluate(log_pi, log_ref, BETA)
    e = mdp.enumerate_episodes(horizon=2)
    assert e.valid.sum(1).min() == 1  # an empty action (end token alone) that terminates
    cut = e.valid & (e.discounts == mdp.gamma) & ~e.continues
    assert cut.any(), "no truncated episode"
    gains = e.rewards - BETA * (log_pi - log_ref)[e.state, e.prefix, e.token]
    gains = gains + cut * (mdp.gamma * value[e.next_state, e.next_prefix])
    total = (
        e.probabilities(log_pi) * (e.valid * mdp.gamma ** e.step.double() * gains).sum(1)
    ).sum()
    assert total.item() == pytest.approx((mdp.start @ value[:, 0]).item(), abs=1e-12)


def test_evaluation_solves_the_bellman_equations_at_every_prefix():
    mdp = TokenMDP.random(4, vocabulary_size=3, length=3, eos=False)
    log_pi, log_ref = mdp.random_policy(1), mdp.random_policy(2)
    q, v = mdp.evaluate(log_pi, log_ref, BETA)
    for action, path in enumerate(mdp.tree.paths):
        for (prefix, token), (following, _) in pairwise(path):
            torch.testing.assert_close(q[:, prefix, token], v[:, following])
        goes_on = mdp.gamma * (1 - mdp.termination[:, action])
        last = mdp.rewards[:, action] + goes_on * (mdp.transitions[:, action] @ v[:, 0])
        torch.testing.assert_close(q[(slice(None), *path[-1])], last)
    expected = (log_pi.exp() * (q - BETA * log_pi + BETA * log_ref)).sum(-1)
    torch.testing.assert_close(v, expected)


def test_optimum_of_a_bandit_is_the_tilted_reference():
    # every action terminates: pi*(a) = ref(a) exp(r(a) / beta) / Z
    mdp = TokenMDP.random(5)
    mdp = replace(mdp, termination=torch.ones_like(mdp.termination))
    log_ref = mdp.random_policy(6)
    tilted = mdp.action_log_probs(log_ref).exp() * (mdp.rewards / BETA).exp()
    optimum = tilted / tilted.sum(-1, keepdim=True)
    by_actions, _ = mdp.solve_actions(log_ref, BETA)
    by_tokens, _ = mdp.solve_tokens(log_ref, BETA)
    torch.testing.assert_close(by_actions.exp(), optimum)
    torch.testing.assert_close(mdp.action_log_probs(by_tokens).exp(), optimum)


def test_optimum_is_stationary_and_beats_its_neighbours():
    mdp = TokenMDP.random(7)
    log_ref = mdp.random_policy(8)
    log_pi, value = mdp.solve_tokens(log_ref, BETA)
    logits = log_pi.clone().requires_grad_()
    best = mdp.regularized_return(logits.log_softmax(-1), log_ref, BETA)
    best.backward()
    assert best.item() == pytest.approx((mdp.start @ value).item(), abs=1e-10)
    assert logits.grad.abs().max() < 1e-10
    for seed in range(5):
        other = (log_pi + 0.3 * mdp.random_policy(seed)).log_softmax(-1)
        assert mdp.regularized_return(other, log_ref, BETA) < best - 1e-4


def test_an_endless_undiscounted_mdp_is_refused():
    mdp = TokenMDP.random(9, gamma=1.0)
    mdp = replace(mdp, termination=torch.zeros_like(mdp.termination), rewards=mdp.rewards + 5)
    with pytest.raises(RuntimeError, match="did not converge"):
        mdp.solve_actions(mdp.random_policy(1), BETA)
