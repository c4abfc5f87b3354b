"""Policy and critic losses: formulas, exact gradients by enumeration, and what must break them."""

from math import inf

import pytest
import torch

from etpo.algorithms.baselines import (
    leave_one_out_baseline,
    prefix_keys,
    state_baseline,
)
from etpo.algorithms.losses import (
    action_weights,
    clip_range,
    clipped_surrogate,
    critic_loss,
    dueling_baseline,
    dueling_q,
    inverse_rms,
    k3,
    pessimistic_q,
    policy_objective,
)
from etpo.algorithms.returns import (
    expectation,
    explained_variance,
    kl_divergence,
    lambda_returns,
    soft_value,
)

from ..token_mdp_oracle import TokenMDP
from .doubly_robust import doubly_robust_objective
from .kl_returns import kl_lambda_returns

BETA = 0.3
CLIP = (0.03, "probability")


def normal(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_policy_objective_is_the_formula():
    log_pi, log_ref, log_old = normal(3, 4, 5).log_softmax(-1)
    q = normal(4, 5, seed=1)
    plain = policy_objective(log_pi, log_ref, None, q, BETA)
    torch.testing.assert_close(plain, -soft_value(log_pi, log_ref, q, BETA))
    proximal = policy_objective(log_pi, log_ref, log_old, q, BETA, eta=0.2)
    torch.testing.assert_close(proximal, plain + 0.2 * kl_divergence(log_pi, log_old))


@pytest.mark.parametrize("eta", [0.0, 0.2])
def test_gradcheck_through_the_log_softmax(eta):
    logits = normal(4, 5).requires_grad_()
    log_ref, log_old = normal(2, 4, 5, seed=1).log_softmax(-1)
    q, advantages, taken = normal(4, 5, seed=2), normal(4, seed=3), torch.tensor([0, 3, 4, 1])

    def plain(x):
        return policy_objective(x.log_softmax(-1), log_ref, log_old, q, BETA, eta)

    def robust(x):
        return doubly_robust_objective(
            x.log_softmax(-1), log_ref, log_old, q, taken, advantages, BETA, eta, None
        )

    assert torch.autograd.gradcheck(plain, logits)
    assert torch.autograd.gradcheck(robust, logits)


def test_the_clipped_objective_by_hand():
    """pi_old = (1/2, 1/4, 1/4), ratios 1.2, 1.0, 0.6 and advantages 1/2, -1/2, -1/2."""
    log_old, log_pi = f64(0.5, 0.25, 0.25).log(), f64(0.6, 0.25, 0.15).log().requires_grad_()
    q, log_ref = f64(1.0, 0.0, 0.0), f64(0.2, 0.3, 0.5).log()
    for clip, bound in ((0.1, 1.1), (0.3, 1.2)):
        loss = policy_objective(log_pi, log_ref, log_old, q, 0.0, clip=clip)
        # the last ratio is below the range, and its advantage is negative
        kept = max(0.6, 1 - clip)
        assert loss.item() == pytest.approx(-(0.5 * bound / 2 - 0.25 / 2 - 0.25 * kept / 2))
        (gradient,) = torch.autograd.grad(loss, log_pi)
        moved = 0.6 / 2 if clip == 0.3 else 0.0
        torch.testing.assert_close(-gradient, f64(moved, -0.25 / 2, 0.0))


@pytest.mark.parametrize("unit", ["ratio", "probability"])
@pytest.mark.parametrize("eta", [0.0, 0.2])
def test_a_clip_does_not_change_the_gradient_at_the_old_policy(eta, unit):
    logits = normal(4, 5).requires_grad_()
    log_pi, log_ref = logits.log_softmax(-1), normal(4, 5, seed=1).log_softmax(-1)
    log_old, q = log_pi.detach(), normal(4, 5, seed=2)
    one, other = (
        torch.autograd.grad(
            policy_objective(log_pi, log_ref, log_old, q, BETA, eta, clip).sum(),
            logits,
            retain_graph=True,
        )[0]
        for clip in (None, clip_range(log_old, 0.2, unit))
    )
    torch.testing.assert_close(one, other)


def test_the_clipped_objective_ignores_tokens_without_probability():
    """No NaN in value and gradient."""
    logits, log_ref, log_old = normal(3, 4, 5)
    logits, off = logits.requires_grad_(), torch.tensor([True, False, False, True, False])
    masked = [x.masked_fill(off, -inf).log_softmax(-1) for x in (logits, log_ref, log_old)]
    q = normal(4, 5, seed=2).masked_fill(off, torch.nan)
    loss = policy_objective(*masked, q, BETA, 0.1, 0.2)
    few = [x[:, ~off].log_softmax(-1) for x in (logits, log_ref, log_old)]
    expected = policy_objective(*few, q[:, ~off], BETA, 0.1, 0.2)
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(x.sum(), logits)[0] for x in (loss, expected))
    torch.testing.assert_close(found, wanted)


def test_only_the_policy_gets_a_gradient():
    log_pi, log_ref, log_old = (
        normal(4, 5, seed=s).log_softmax(-1).requires_grad_() for s in range(3)
    )
    q, advantages = normal(4, 5, seed=3).requires_grad_(), normal(4, seed=4).requires_grad_()
    taken = torch.tensor([0, 3, 4, 1])
    loss = doubly_robust_objective(log_pi, log_ref, log_old, q, taken, advantages, BETA, 0.2, CLIP)
    loss.sum().backward()
    assert log_pi.grad is not None
    assert [x.grad for x in (log_ref, log_old, q, advantages)] == [None] * 4


@pytest.mark.parametrize("eta", [0.0, 0.2])
def test_gradient_vanishes_at_the_closed_form_optimum_only(eta):
    log_ref, log_old = normal(2, 4, 5, seed=1).log_softmax(-1)
    q = normal(4, 5, seed=2)
    # pi ~ pi_ref^{beta/(beta+eta)} pi_old^{eta/(beta+eta)} exp(Q/(beta+eta))
    optimum = (BETA * log_ref + eta * log_old + q) / (BETA + eta)
    for shift, still in ((0.0, True), (0.1, False)):
        logits = (optimum + shift * normal(4, 5, seed=3)).requires_grad_()
        loss = policy_objective(logits.log_softmax(-1), log_ref, log_old, q, BETA, eta)
        loss.sum().backward()
        assert (logits.grad.abs().max().item() < 1e-12) is still


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eta", [0.0, 0.2])
def test_nothing_moves_without_reward_at_the_reference(dtype, eta):
    logits = normal(7, 1000).to(dtype).requires_grad_()
    before, log_ref = logits.detach().clone(), logits.detach().log_softmax(-1)
    optimizer = torch.optim.Adam([logits], lr=0.1, eps=1e-30)  # any rounding noise would show
    for _ in range(3):
        log_pi = logits.log_softmax(-1)
        zero = torch.zeros_like(log_ref)
        loss = doubly_robust_objective(
            log_pi, log_ref, log_ref, zero, zero[:, 0].long(), zero[:, 0], BETA, eta, CLIP
        )
        optimizer.zero_grad()
        loss.sum().backward()
        assert (logits.grad == 0).all()
        optimizer.step()
    assert torch.equal(logits, before)
    # the reward is what moves it
    q = torch.zeros_like(log_ref).index_fill_(1, torch.tensor([3]), 1.0)
    loss = policy_objective(logits.log_softmax(-1), log_ref, log_ref, q, BETA, eta)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert (gradient[:, 3] < 0).all()


def test_masked_ids_leave_loss_and_gradient_alone():
    logits, q = normal(4, 5).requires_grad_(), normal(4, 5, seed=2)
    log_ref = normal(4, 5, seed=1).log_softmax(-1)

    def pad(x, value):
        return torch.nn.functional.pad(x, (0, 2), value=value)

    log_pi = pad(logits, -inf).log_softmax(-1)
    loss = policy_objective(log_pi, pad(log_ref, -inf), pad(log_ref, -inf), pad(q, 9.0), BETA, 0.2)
    plain = policy_objective(logits.log_softmax(-1), log_ref, log_ref, q, BETA, 0.2)
    torch.testing.assert_close(loss, plain)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    (expected,) = torch.autograd.grad(plain.sum(), logits)
    torch.testing.assert_close(gradient, expected)


def test_clip_range_by_hand():
    """0.05 of probability is 5 times a probability of 0.01, and 1/16 of one of 0.8."""
    log_old = f64(0.01, 0.8).log()
    assert clip_range(log_old, 0.05, "probability").tolist() == pytest.approx([5, 0.0625])
    assert clip_range(log_old, 0.05, "ratio") == 0.05
    assert clip_range(log_old, None, "probability") is None


@pytest.mark.parametrize(
    ("unit", "clip", "advantage", "reached"),
    [
        ("ratio", 0.2, 1.0, 0.012),
        ("ratio", 0.2, -1.0, 0.008),
        ("probability", 0.05, 1.0, 0.06),
        ("probability", 0.005, -1.0, 0.005),
    ],
)
def test_steps_of_a_rare_token_end_at_the_clip(unit, clip, advantage, reached):
    log_old = f64(0.01, 0.29, 0.7).log()
    logits, width = log_old.clone().requires_grad_(), clip_range(log_old[0], clip, unit)
    for _ in range(4000):
        loss = clipped_surrogate(logits.log_softmax(-1)[0], log_old[0], f64(advantage), width)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        logits = (logits - 0.002 * gradient).detach().requires_grad_()
    assert logits.softmax(-1)[0].item() == pytest.approx(reached, rel=0.01)


@pytest.mark.parametrize(
    ("ratio", "advantage", "clip", "loss", "slope"),
    [  # slope = d loss / d ratio
        (1.0, 2.0, 0.2, -2.0, -2.0),
        (1.5, 1.0, 0.2, -1.2, 0.0),  # gained enough: stop
        (1.5, -1.0, 0.2, 1.5, 1.0),  # went the wrong way: pull back in full
        (0.5, 1.0, 0.2, -0.5, -1.0),
        (0.5, -1.0, 0.2, 0.8, 0.0),
        (1.5, 1.0, None, -1.5, -1.0),
        (0.5, -1.0, None, 0.5, 1.0),
    ],
)
def test_clipped_surrogate_by_hand(ratio, advantage, clip, loss, slope):
    log_old = f64(0.3).log()
    log_pi = (f64(ratio).log() + log_old).requires_grad_()
    value = clipped_surrogate(log_pi, log_old, f64(advantage), clip)
    value.sum().backward()
    assert value.item() == pytest.approx(loss)
    assert log_pi.grad.item() / ratio == pytest.approx(slope)


class Enumerated:
    """The exact gradient of J, and the mean and spread of its estimators over all episodes."""

    def __init__(self, seed):
        mdp = self.mdp = TokenMDP.random(seed, acyclic=True)
        self.log_ref = mdp.random_policy(10)
        self.logits = mdp.random_policy(11).requires_grad_()
        self.log_pi = self.logits.log_softmax(-1)
        self.log_old = self.log_pi.detach()
        e = self.e = mdp.enumerate_episodes(horizon=3)
        self.at = (e.state, e.prefix)
        self.weight = e.valid * action_weights(mdp.gamma, e.step.double())
        self.probability = e.probabilities(self.log_old)
        self.critic = normal(*self.logits.shape, seed=20)
        self.exact_q = mdp.evaluate(self.log_old, self.log_ref, BETA)[0]
        self.gradient = self.grad(-mdp.regularized_return(self.log_pi, self.log_ref, BETA))

    def grad(self, loss):
        return torch.autograd.grad(loss, self.logits, retain_graph=True)[0]

    def returns(self, q, lambda_, form="q"):
        e = self.e
        v = soft_value(self.log_old, self.log_ref, q, BETA)[e.next_state, e.next_prefix]
        if form == "q":
            q_taken = q[e.next_state, e.next_prefix, e.next_token]
            return lambda_returns(e.rewards, e.discounts, v, q_taken, lambda_, e.continues)
        kl = kl_divergence(self.log_old, self.log_ref)[e.next_state, e.next_prefix]
        return kl_lambda_returns(e.rewards, e.discounts, v, kl, lambda_, BETA, e.continues)

    def losses(self, q, returns, eta=0.0, unit="ratio"):
        return doubly_robust_objective(
            self.log_pi[self.at],
            self.log_ref[self.at],
            self.log_old[self.at],
            q[self.at],
            self.e.token,
            returns - q[(*self.at, self.e.token)],
            BETA,
            eta,
            None if unit is None else (0.2, unit),
        )

    def error(self, losses, weight=None):
        """Relative error of the mean gradient of per-token losses [N, K] summed with weights."""
        weight = self.weight if weight is None else weight
        mean = self.grad((self.probability * (weight * losses).sum(1)).sum())
        return ((mean - self.gradient).norm() / self.gradient.norm()).item()

    def variance(self, losses):
        """E |g - E g|^2 / |E g|^2 of the gradient g of one episode."""
        per_episode = (self.weight * losses).sum(1)
        (gradients,) = torch.autograd.grad(
            per_episode,
            self.logits,
            torch.eye(len(per_episode), dtype=torch.float64),
            retain_graph=True,
            is_grads_batched=True,
        )
        squares = (gradients - self.gradient).square().sum((1, 2, 3))
        return (self.probability @ squares / self.gradient.square().sum()).item()


@pytest.fixture(params=range(2))
def case(request):
    return Enumerated(request.param)


def test_plain_objective_needs_the_exact_q(case):
    def plain(q):
        return policy_objective(case.log_pi, case.log_ref, None, q, BETA)[case.at]

    assert case.error(plain(case.exact_q)) < 1e-12
    assert case.error(plain(case.critic)) > 0.5
    by_visitation = case.mdp.visitation(case.log_old) * policy_objective(
        case.log_pi, case.log_ref, None, case.exact_q, BETA
    )
    torch.testing.assert_close(case.grad(by_visitation.sum()), case.gradient)


@pytest.mark.parametrize("unit", [None, "ratio", "probability"])
@pytest.mark.parametrize("eta", [0.0, 0.2])
@pytest.mark.parametrize("form", ["q", "kl"])
def test_doubly_robust_gradient_is_exact_for_a_random_critic(case, unit, eta, form):
    returns = case.returns(case.critic, 1.0, form)
    assert case.error(case.losses(case.critic, returns, eta, unit)) < 1e-12


def test_doubly_robust_gradient_needs_sums_and_discounted_actions(case):
    losses = case.losses(case.critic, case.returns(case.critic, 1.0))
    e = case.e
    same_action = (e.step.unsqueeze(2) == e.step.unsqueeze(1)) & e.valid.unsqueeze(1)
    assert case.error(losses, case.weight / same_action.sum(2)) > 0.05, "mean over an action"
    assert case.error(losses, e.valid.double()) > 0.02, "no gamma^t"
    biased = case.losses(case.critic, case.returns(case.critic, 0.5))
    assert case.error(biased) > 0.05, "a bootstrap from a random critic"


@pytest.mark.parametrize("pessimism_threshold", [0.2, 1.0])
def test_pessimistic_q_must_stand_in_both_terms(case, pessimism_threshold):
    value = expectation(case.log_old, case.critic)
    q = pessimistic_q(case.critic, value, case.log_old, pessimism_threshold)
    assert (q != case.critic).any()
    for returns in (case.returns(case.critic, 1.0), case.returns(q, 1.0)):
        assert case.error(case.losses(q, returns)) < 1e-12
        exact_term = policy_objective(case.log_pi, case.log_ref, None, q, BETA)[case.at]
        taken = (*case.at, case.e.token)
        raw_correction = clipped_surrogate(
            case.log_pi[taken], case.log_old[taken], returns - case.critic[taken], 0.2
        )
        assert case.error(exact_term + raw_correction) > 0.05


def test_exact_critic_makes_the_control_variate_pay(case):
    exact_term = policy_objective(case.log_pi, case.log_ref, None, case.exact_q, BETA)[case.at]
    taken = (*case.at, case.e.token)
    advantage = (
        case.returns(case.exact_q, 1.0, "kl")
        - BETA * (case.log_old - case.log_ref)[taken]
        - soft_value(case.log_old, case.log_ref, case.exact_q, BETA)[case.at]
    )
    policy_gradient = clipped_surrogate(case.log_pi[taken], case.log_old[taken], advantage, None)
    assert case.error(policy_gradient) < 1e-12
    plain = case.variance(exact_term)
    robust = case.variance(case.losses(case.exact_q, case.returns(case.exact_q, 1.0)))
    robust_kl = case.variance(case.losses(case.exact_q, case.returns(case.exact_q, 1.0, "kl")))
    assert plain < robust < robust_kl < case.variance(policy_gradient)


def test_unweighted_vocabulary_mean_ignores_q():
    """The official code's loss mean_w(beta log pi - Q): one gradient for every Q table."""
    logits = normal(4, 5).requires_grad_()
    log_ref = normal(4, 5, seed=1).log_softmax(-1)

    def gradients(objective):
        tables = (torch.zeros(4, 5, dtype=torch.float64), 10 * normal(4, 5, seed=2))
        return [
            torch.autograd.grad(objective(logits.log_softmax(-1), q).sum(), logits)[0]
            for q in tables
        ]

    first, second = gradients(lambda log_pi, q: (BETA * log_pi - q).mean(-1))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    first, second = gradients(lambda log_pi, q: policy_objective(log_pi, log_ref, None, q, BETA))
    assert (first - second).abs().max() > 0.1


def test_pessimistic_q_takes_warnings_and_no_promises_of_rare_tokens():
    log_old = f64(0.01, 0.01, 0.02, 0.96).log()
    q, value = f64(5, -5, 6, 7), f64(1).squeeze()
    assert pessimistic_q(q, value, log_old, threshold=0.015).tolist() == [1, -5, 6, 7]
    assert pessimistic_q(q, value, log_old, threshold=0.0).tolist() == [5, -5, 6, 7]
    assert pessimistic_q(q, value, log_old, threshold=1.0).tolist() == [1, -5, 1, 1]


def test_inverse_rms_has_a_limit():
    assert inverse_rms(f64(0.25)).item() == 2
    assert inverse_rms(f64(0.0)).item() == pytest.approx(100)
    assert inverse_rms(f64(0.0), least=0.5).item() == 2


def test_dueling_q_has_the_value_as_its_mean_and_no_gradient_to_the_policy():
    value, advantage = normal(4), normal(4, 5, seed=1).requires_grad_()
    log_pi = normal(4, 5, seed=2).log_softmax(-1).requires_grad_()
    q = dueling_q(value, advantage, log_pi)
    torch.testing.assert_close((log_pi.exp() * q).sum(-1), value)
    # a shift per prefix, nothing else
    shift = q - advantage
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift))
    torch.testing.assert_close(shift[:, 0], dueling_baseline(value, advantage, log_pi))
    q.square().sum().backward()
    assert log_pi.grad is None
    assert advantage.grad.abs().max() > 0.1


def test_critic_loss_by_hand():
    # errors 0.5, 3, -3; delta 2: e^2 / 2 inside, 2 (|e| - 1) beyond
    q, targets = f64(1.5, 4, -2).requires_grad_(), f64(1, 1, 1).requires_grad_()
    mask = torch.tensor([True, True, True])
    assert critic_loss(q, targets, mask, "huber", 2.0).tolist() == [0.125, 4, 4]
    assert critic_loss(q, targets, mask, "mse").tolist() == [0.125, 4.5, 4.5]
    mask = torch.tensor([True, False, True])
    loss = critic_loss(q, targets, mask, "mse")
    assert loss.tolist() == [0.125, 0, 4.5]
    loss.sum().backward()
    assert q.grad.tolist() == [0.5, 0, -3]
    assert targets.grad is None
    with pytest.raises(ValueError, match="huber or mse"):
        critic_loss(q, targets, mask, "l1")


def test_action_weights_are_powers_of_gamma():
    steps = torch.tensor([0, 1, 3])
    torch.testing.assert_close(action_weights(0.5, steps), torch.tensor([1, 0.5, 0.125]))
    assert action_weights(0.0, steps).tolist() == [1, 0, 0]
    assert action_weights(1, steps).tolist() == [1, 1, 1]


def test_leave_one_out_baseline_by_hand():
    # valid tokens sum to 3, 3, 12 in 2, 1, 2 tokens; what is not valid counts nowhere
    errors = torch.stack([f64(1, 2), f64(3, torch.nan), f64(5, 7)])
    valid = torch.tensor([[True, True], [True, False], [True, True]])
    one = torch.zeros(3, dtype=torch.long)
    assert leave_one_out_baseline(errors, valid, one).tolist() == [15 / 3, 15 / 4, 6 / 3]
    assert leave_one_out_baseline(errors[:1], valid[:1], one[:1]).tolist() == [0]


@pytest.mark.parametrize("group", [[0, 0, 0, 0], [0, 1, 0, 1]])
def test_a_row_has_no_part_in_its_own_baseline(group):
    """So that the baseline is independent of the row's actions and adds no bias."""
    errors, valid, group = normal(4, 6), normal(4, 6, seed=1) > -1, torch.tensor(group)
    before = leave_one_out_baseline(errors, valid, group)
    for row in range(4):
        changed = errors.clone()
        changed[row] += normal(6, seed=2)
        after = leave_one_out_baseline(changed, valid, group)
        others = (torch.arange(4) != row) & (group == group[row])
        torch.testing.assert_close(after[~others], before[~others])
        assert ((after - before)[others].abs() > 1e-3).all()


def test_state_baseline_by_hand():
    """Three environments of two steps; the first two share the prompt and the second prefix."""
    errors, valid = f64([1, 2], [3, 5], [7, 0]), torch.tensor([[True] * 2] * 2 + [[True, False]])
    prompts = torch.tensor([[1, 1], [1, 1], [2, 2]])
    prefixes = torch.tensor([[10, 11], [10, 12], [20, 21]])
    found = state_baseline(errors, valid, prompts, prefixes, torch.zeros(3, dtype=torch.long))
    first, second, third = (3 + 5 + 7) / 3, (1 + 2 + 7) / 3, (1 + 2 + 3 + 5) / 4
    at_prompt = (3 + 5 + first) / 3, (1 + 2 + second) / 3, third
    expected = [
        [(3 + at_prompt[0]) / 2, at_prompt[0]],  # nobody else has the prefix 11
        [(1 + at_prompt[1]) / 2, at_prompt[1]],
        [third, third],
    ]
    torch.testing.assert_close(found[valid], f64(*expected)[valid])


@pytest.mark.parametrize("group", [[0, 0, 0, 0], [0, 1, 0, 1]])
def test_a_row_has_no_part_in_its_own_state_baseline(group):
    errors, valid, group = normal(4, 6), normal(4, 6, seed=1) > -1, torch.tensor(group)
    random = torch.Generator().manual_seed(2)
    prompts, prefixes = (torch.randint(n, (4, 6), generator=random) for n in (2, 5))
    before = state_baseline(errors, valid, prompts, prefixes, group)
    for row in range(4):
        changed = errors.clone()
        changed[row] += normal(6, seed=2)
        after = state_baseline(changed, valid, prompts, prefixes, group)
        others = (torch.arange(4) != row) & (group == group[row])
        torch.testing.assert_close(after[~others], before[~others])
        assert ((after - before)[others].abs() > 1e-4).all()


def test_prefix_keys_are_of_the_tokens_alone():
    prompts = torch.tensor([[0, 0, 5, 6], [0, 0, 5, 6], [1, 5, 6, 7], [0, 5, 6, 7]])
    mask = torch.tensor([[False, False, True, True]] * 2 + [[False, True, True, True]] * 2)
    actions = torch.tensor([[7, 8, 0], [7, 9, 1], [8, 3, 3], [8, 4, 4]])
    keys = prefix_keys(prompts, mask, actions)
    tokens = [
        (*prompt[seen].tolist(), *row[:column].tolist())
        for prompt, seen, row in zip(prompts, mask, actions, strict=True)
        for column in range(3)
    ]
    for one, key in zip(tokens, keys.flatten().tolist(), strict=True):
        same = [other == key for other in keys.flatten().tolist()]
        assert same == [other == one for other in tokens]
    # the prompt "5 6" with the action "7" is the prompt "5 6 7"
    assert keys[0, 1] == keys[2, 0]
    random = torch.randint(50000, (20000, 8), generator=torch.Generator().manual_seed(0))
    whole = prefix_keys(random, torch.ones_like(random).bool(), random[:, :1])
    assert len(whole.unique()) == len(random.unique(dim=0))


def test_explained_variance_by_hand():
    targets = f64(2, 4, 6)  # variance 4
    assert explained_variance(f64(1, 2, 3), targets) == 0.75  # errors 1, 2, 3: variance 1
    assert explained_variance(f64(7, 9, 11), targets) == 1.0  # a shift explains as much
    assert explained_variance(f64(5, 5, 5), targets) == 0.0
    assert explained_variance(f64(-2, -4, -6), targets) == -3.0  # errors 4, 8, 12: variance 16
    assert explained_variance(f64(1, 2, 3), f64(5, 5, 5)) == 0.0


def test_k3_is_an_unbiased_kl_and_never_negative():
    log_pi, log_ref = normal(2, 7).log_softmax(-1)
    estimates = k3(log_pi, log_ref)
    assert (estimates >= 0).all()
    torch.testing.assert_close(expectation(log_pi, estimates), kl_divergence(log_pi, log_ref))
