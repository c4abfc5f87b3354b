"""Soft values, targets and lambda-returns: hand algebra, masked ids, exact expectations."""

from math import inf, log, nan

import pytest
import torch

from etpo.algorithms.baselines import (
    group_standardized,
    prompt_groups,
    unique_as_one_group,
)
from etpo.algorithms.returns import (
    discounted_returns,
    expectation,
    generalized_advantages,
    kl_divergence,
    kl_penalized_rewards,
    lambda_returns,
    soft_value,
)

from ..token_mdp_oracle import TokenMDP
from .kl_returns import kl_lambda_returns

BETA = 0.3


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


PI, REF = f64(0.5, 0.25, 0.25), f64(0.25, 0.25, 0.5)


def test_soft_value_by_hand():
    # KL = 1/2 ln 2 + 1/4 ln 1 + 1/4 ln 1/2 = 1/4 ln 2;  E_pi[Q] = 1/2 + 2/4 + 4/4 = 2
    q = f64(1, 2, 4)
    assert kl_divergence(PI.log(), REF.log()).item() == pytest.approx(log(2) / 4)
    value = soft_value(PI.log(), REF.log(), q, beta=0.5)
    assert value.item() == pytest.approx(2 - 0.5 * log(2) / 4)
    # the optimum pi* = ref exp(Q / beta) / Z has V = beta ln Z
    log_best = (REF.log() + q / 0.5).log_softmax(-1)
    best = soft_value(log_best, REF.log(), q, beta=0.5)
    assert best.item() == pytest.approx(0.5 * (REF * (q / 0.5).exp()).sum().log().item())


def test_masked_ids_count_nothing_in_value_and_gradient():
    logits = f64(0.3, -0.2, 0.9).requires_grad_()
    padded = torch.cat([logits, f64(-inf, -inf)])
    log_ref = torch.cat([REF.log(), f64(-inf, -inf)])
    q = f64(1, 2, 4, nan, inf)
    value = soft_value(padded.log_softmax(-1), log_ref, q, BETA)
    (gradient,) = torch.autograd.grad(value, logits)
    plain = soft_value(logits.log_softmax(-1), REF.log(), q[:3], BETA)
    (expected,) = torch.autograd.grad(plain, logits)
    assert value.item() == pytest.approx(plain.item())
    torch.testing.assert_close(gradient, expected)


def test_kl_is_infinite_off_the_support():
    assert kl_divergence(f64(0.5, 0.5).log(), f64(1, 0).log()) == inf
    assert kl_divergence(f64(1, 0).log(), f64(0.5, 0.5).log()).item() == pytest.approx(log(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    x = torch.ones(2, 3, dtype=dtype)
    true = torch.ones(2, 3, dtype=torch.bool)
    assert soft_value(x.log_softmax(-1), x.log_softmax(-1), x, BETA).dtype == dtype
    assert lambda_returns(x, x, x, x, 0.5, true).dtype == dtype


# Two actions over three tokens; pi and pi_ref as above at every prefix, beta = 1/2, gamma = 0.9.
#   action 1 = (w1, w2), reward -1, then action 2 = (w3), reward 3, all in one packed row.
# c = beta KL = 1/2 * 1/4 ln 2.
#   V_2 = E_pi (1, 2, 4)  - c = 1/2 + 2/4 + 4/4 - c = 2 - c,   w2 = 2: Q = 4
#   V_3 = E_pi (4, 0, -4) - c = 2 + 0 - 1 - c       = 1 - c,   w3 = 1: Q = 0
#   V_4 = E_pi (2, 2, 2)  - c = 2 - c, of the true next observation (read only after a truncation)
C = 0.5 * log(2) / 4
Q_NEXT = f64([1, 2, 4], [4, 0, -4], [2, 2, 2])


def example(terminated):
    """rewards, discounts, next_values, next_q_taken, continues: [1, 5]

    A second episode (one token, reward 100, terminated) and one padding token follow in the row.
    """
    values = soft_value(PI.log(), REF.log(), Q_NEXT, beta=0.5)
    rewards = f64(0, -1, 3, 100, 0)
    discounts = f64(1, 0.9, 0.0 if terminated else 0.9, 0, 0)
    continues = torch.tensor([True, True, False, False, False])
    q_taken = f64(4, 0, nan, nan, nan)  # never read where the episode does not go on
    rows = (rewards, discounts, torch.cat([values, f64(7, 7)]), q_taken, continues)
    return tuple(row.unsqueeze(0) for row in rows)


def test_returns_at_lambda_zero_by_hand():
    # y_1 = V_2 = 2 - c;  y_2 = -1 + 0.9 (1 - c);  y_3 = 3, or 3 + 0.9 (2 - c) if truncated
    for terminated, last in ((True, 3), (False, 4.8 - 0.9 * C)):
        *rows, continues = example(terminated)
        expected = f64([2 - C, -0.1 - 0.9 * C, last, 100, 0])
        torch.testing.assert_close(lambda_returns(*rows, 0.0, continues), expected)


def test_lambda_returns_by_hand():
    # lambda = 1/2, terminated:
    #   G_3 = 3
    #   G_2 = -1 + 0.9 [V_3 + 1/2 (G_3 - Q_3)] = -1 + 0.9 [1 - c + 3/2] = 1.25 - 0.9 c
    #   G_1 = V_2 + 1/2 (G_2 - Q_2) = 2 - c + 1/2 (1.25 - 0.9 c - 4) = 0.625 - 1.45 c
    # lambda = 1/2, truncated:
    #   G_3 = 3 + 0.9 V_4 = 4.8 - 0.9 c
    #   G_2 = -1 + 0.9 [1 - c + 1/2 (4.8 - 0.9 c)] = 2.06 - 1.305 c
    #   G_1 = 2 - c + 1/2 (2.06 - 1.305 c - 4) = 1.03 - 1.6525 c
    expected = {
        True: f64([0.625 - 1.45 * C, 1.25 - 0.9 * C, 3, 100, 0]),
        False: f64([1.03 - 1.6525 * C, 2.06 - 1.305 * C, 4.8 - 0.9 * C, 100, 0]),
    }
    for terminated in (True, False):
        *rows, continues = example(terminated)
        returns = lambda_returns(*rows, 0.5, continues)
        torch.testing.assert_close(returns, expected[terminated])


class Enumerated:
    """Exact moments of returns given (state, prefix, token), over all episodes of a small MDP."""

    def __init__(self, mdp, horizon, behaviour, log_pi, log_ref):
        self.mdp, self.log_pi, self.log_ref = mdp, log_pi, log_ref
        self.e = mdp.enumerate_episodes(horizon)
        self.weight = self.e.probabilities(behaviour).unsqueeze(1) * self.e.valid

    def random_critic(self, seed):
        rng = torch.Generator().manual_seed(seed)
        return torch.randn(self.log_pi.shape, generator=rng, dtype=torch.float64)

    def returns(self, q, lambda_, form):
        e = self.e
        v = soft_value(self.log_pi, self.log_ref, q, BETA)[e.next_state, e.next_prefix]
        if form == "q":
            q_taken = q[e.next_state, e.next_prefix, e.next_token]
            return lambda_returns(e.rewards, e.discounts, v, q_taken, lambda_, e.continues)
        kl = kl_divergence(self.log_pi, self.log_ref)[e.next_state, e.next_prefix]
        return kl_lambda_returns(e.rewards, e.discounts, v, kl, lambda_, BETA, e.continues)

    def mean(self, values):
        total, mass = torch.zeros(2, *self.log_pi.shape, dtype=torch.float64)
        at = (self.e.state, self.e.prefix, self.e.token)
        total.index_put_(at, self.weight * values, accumulate=True)
        mass.index_put_(at, self.weight, accumulate=True)
        assert (mass > 0).all(), "a token was never taken"
        return total / mass


@pytest.fixture(params=range(2))
def on_policy(request):
    mdp = TokenMDP.random(request.param, acyclic=True)
    log_pi, log_ref = mdp.random_policy(10), mdp.random_policy(11)
    return Enumerated(mdp, 3, log_pi, log_pi, log_ref)


@pytest.mark.parametrize("form", ["q", "kl"])
def test_returns_at_lambda_one_are_unbiased_for_q_pi_whatever_the_critic(on_policy, form):
    case = on_policy
    truth, _ = case.mdp.evaluate(case.log_pi, case.log_ref, BETA)
    critic = case.random_critic(5)
    torch.testing.assert_close(
        case.mean(case.returns(critic, 1.0, form)), truth, rtol=0, atol=1e-11
    )
    biased = case.mean(case.returns(critic, 0.5, form))
    assert (biased - truth).abs().max() > 0.1


@pytest.mark.parametrize("lambda_", [0.0, 0.3, 0.9])
def test_both_forms_have_the_same_mean_on_policy(on_policy, lambda_):
    critic = on_policy.random_critic(6)
    with_q, with_kl = (on_policy.returns(critic, lambda_, form) for form in ("q", "kl"))
    torch.testing.assert_close(on_policy.mean(with_q), on_policy.mean(with_kl), rtol=0, atol=1e-11)
    if lambda_ > 0:
        assert (with_q - with_kl).abs().max() > 0.1


def test_control_variate_lowers_the_variance_with_the_exact_critic(on_policy):
    case = on_policy
    truth, _ = case.mdp.evaluate(case.log_pi, case.log_ref, BETA)

    def variance(form):
        at = (case.e.state, case.e.prefix, case.e.token)
        return (
            case.weight * (case.returns(truth, 1.0, form) - truth[at]).square()
        ).sum().item() / case.weight.sum().item()

    assert variance("q") < 0.5 * variance("kl")


def test_only_the_corrected_form_keeps_q_pi_as_fixed_point_off_policy():
    mdp = TokenMDP.random(1, acyclic=True)
    log_pi, log_ref, behaviour = (mdp.random_policy(seed) for seed in (10, 11, 12))
    case = Enumerated(mdp, 3, behaviour, log_pi, log_ref)
    truth, _ = mdp.evaluate(log_pi, log_ref, BETA)
    for lambda_ in (0.0, 0.5, 1.0):
        corrected = case.mean(case.returns(truth, lambda_, "q"))
        torch.testing.assert_close(corrected, truth, rtol=0, atol=1e-11)
    assert (case.mean(case.returns(truth, 1.0, "kl")) - truth).abs().max() > 0.1


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("form", ["q", "kl"])
def test_truncation_bootstraps_at_the_true_next_observation(lambda_, form):
    # a cyclic MDP cut after two actions: exact only if the cut takes R + gamma V
    mdp = TokenMDP.random(2, num_states=2, gamma=0.95)
    log_pi, log_ref = mdp.random_policy(10), mdp.random_policy(11)
    case = Enumerated(mdp, 2, log_pi, log_pi, log_ref)
    truth, _ = mdp.evaluate(log_pi, log_ref, BETA)
    mean = case.mean(case.returns(truth, lambda_, form))
    torch.testing.assert_close(mean, truth, rtol=0, atol=1e-11)


def test_expectation_ignores_tokens_of_zero_probability():
    assert expectation(f64(0.25, 0.75, 0).log(), f64(4, 8, nan)).item() == pytest.approx(7)


def test_kl_penalized_rewards_leave_padding_at_zero():
    rewards = kl_penalized_rewards(
        torch.tensor([[0.0, 1.0, 5.0]]),
        torch.tensor([[-1.0, -2.0, 3.0]]),
        torch.tensor([[-1.5, -1.0, 0.0]]),
        0.5,
        torch.tensor([[True, True, False]]),
    )
    assert rewards.tolist() == [[-0.25, 1.5, 0.0]]


def test_generalized_advantages_at_lambda_one_are_returns_less_values():
    random = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 6, generator=random, dtype=torch.float64)
    following = torch.nn.functional.pad(values[:, 1:], (0, 1), value=0.7)
    discounts = torch.full_like(rewards, 0.9)
    continues = torch.arange(6).expand(3, 6) < 5
    advantages = generalized_advantages(rewards, discounts, values, following, 1.0, continues)
    powers = 0.9 ** torch.arange(6, dtype=torch.float64)
    for k in range(6):
        returns = rewards[:, k:] @ powers[: 6 - k] + 0.9 ** (6 - k) * 0.7
        torch.testing.assert_close(advantages[:, k], returns - values[:, k])


def test_equal_prompts_form_a_group_for_any_padding():
    ids = torch.tensor([[0, 5], [9, 5], [4, 5], [9, 6], [8, 8]])
    mask = torch.tensor([[0, 1], [0, 1], [1, 1], [0, 1], [1, 1]]).bool()
    group = prompt_groups(ids, mask).tolist()
    assert group[0] == group[1]
    assert len(set(group)) == 4
    group = unique_as_one_group(prompt_groups(ids, mask)).tolist()
    assert group[0] == group[1]
    assert group[2] == group[3] == group[4] != group[0]


def test_a_group_of_one_has_no_advantage():
    returns, group = torch.tensor([1.0, 2.0, 6.0, 5.0]), torch.tensor([0, 0, 0, 1])
    standardized = group_standardized(returns, group, epsilon=0.0)
    assert standardized[:3].tolist() == pytest.approx([-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5])
    assert group_standardized(returns, group)[3] == 0


def test_discounted_returns_by_hand():
    rewards, discounts = f64([1, 2, 3, 9]), f64([0.5, 0.5, 0, 0.5])
    continues = torch.tensor([[True, True, False, False]])
    returns = discounted_returns(rewards, discounts, continues)
    assert returns.tolist() == [[1 + 0.5 * 3.5, 2 + 0.5 * 3, 3, 9]]
