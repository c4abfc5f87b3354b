"""Every candidate cure does what it says, and runs through the real loop."""

import pytest
import torch

from etpo.algorithms.variants import (
    AdaptiveBetaETPO,
    JointClipETPO,
    TwinETPO,
    WarmUpETPO,
    WindowETPO,
)
from etpo.errors import ConfigError
from etpo.models.critics import TrunkCritic

PLAIN = {
    "beta": 0.02,
    "correction": False,
    "clip_low": None,
    "clip_high": None,
    "leak": 0.0,
    "max_kl": None,
}


@pytest.fixture
def build(build_etpo):
    """build(variant, ...): the algorithm on a small random model."""

    def make(variant, **changes):
        return build_etpo(TrunkCritic, variant=variant, **(PLAIN | changes))

    return make


def test_twins_take_the_smaller_q_and_are_both_fitted(build, letter_env, fit):
    module = build(TwinETPO)
    data = fit(module, letter_env(4), 2)
    batch = module.annotate(data.rollout)
    inputs = batch.prompt_ids, batch.prompt_mask, batch.action_ids, batch.features
    outputs = module.critic(*inputs)
    first, second = module.heads_of(outputs, batch.old_log_probs)
    value, q = module.values_of(outputs, batch.old_log_probs)
    assert (first != second).any()
    assert torch.equal(q, torch.where(first < second, first, second))
    expected = (batch.old_log_probs.exp() * q).sum(-1)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)
    module.log_mean = lambda *_: None
    module.critic_step(batch).backward()
    for head in module.critic.head.heads:
        assert head.value.weight.grad.abs().max() > 0


def test_the_window_keeps_the_last_iterations(build, letter_env, fit):
    module = build(WindowETPO, window=2)
    fit(module, letter_env(4), 3)
    assert len(module.earlier) == 2
    module.log_mean = lambda *_: None
    fitted = []

    def errors(outputs, log_old, action_ids, returns, mask):
        fitted.append(returns)
        return (outputs[0],)

    module.errors = errors
    fresh = module.earlier[-1]
    for _ in range(2):
        module.critic_step(fresh)
    assert {id(returns) for returns in fitted} == {id(batch.returns) for batch in module.earlier}
    assert [returns is fresh.returns for returns in fitted[::2]] == [True, True]


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_the_window_drops_the_oldest_iteration(build, letter_env, fit, steps):
    module = build(WindowETPO, window=3)
    rollout = fit(module, letter_env(4), 1).rollout
    module.log_mean = lambda *_: None
    annotated = []
    for _ in range(5):
        annotated.append(module.annotate(rollout))
        for _ in range(steps):
            module.critic_step(annotated[-1])
    assert [
        batch.returns is kept.returns
        for batch, kept in zip(annotated[-3:], module.earlier, strict=True)
    ] == [True] * 3


def test_the_policy_rests_while_the_critic_warms_up(build, letter_env, fit):
    module = build(WarmUpETPO, warm_up=2)
    parts = module.backbone.policy, module.critic
    before = [[p.clone() for p in part.parameters()] for part in parts]

    def moved():
        return [
            any((old != new).any() for old, new in zip(kept, part.parameters(), strict=True))
            for kept, part in zip(before, parts, strict=True)
        ]

    fit(module, letter_env(4), 2)
    assert moved() == [False, True]
    fit(module, letter_env(4), 3)
    assert moved() == [True, True]


@pytest.mark.parametrize(("kl", "factor"), [(3.0, 1.1), (9.0, 1.2), (0.0, 0.8), (2.0, 1.0)])
def test_beta_follows_the_kl_to_the_reference(build, kl, factor):
    module = build(AdaptiveBetaETPO, target_kl=2.0)
    module.all_gather = lambda tensor: tensor[None]
    module.rollout_metrics = {"rollout/kl_to_reference": kl}
    module.on_train_epoch_end()
    assert float(module.beta_factor) == pytest.approx(factor)
    assert "beta_factor" in module.state_dict()


def test_beta_in_use_is_the_scaled_one(build, letter_env, fit):
    module = build(AdaptiveBetaETPO, target_kl=1e6)
    fit(module, letter_env(4), 2)
    assert module.beta == pytest.approx(0.02 * 0.8**2)


def test_one_norm_for_policy_and_critic(build):
    module = build(JointClipETPO, max_grad_norm=1.0)
    optimizer = module.configure_optimizers()["optimizer"]
    groups = [group["params"] for group in optimizer.param_groups]
    for parameters, size in zip(groups, (3.0, 4.0), strict=True):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        parameters[0].grad.view(-1)[0] = size
    module.configure_gradient_clipping(optimizer)
    for parameters, size in zip(groups, (0.6, 0.8), strict=True):
        assert float(parameters[0].grad.view(-1)[0]) == pytest.approx(size, rel=1e-4)


@pytest.mark.parametrize(
    ("variant", "key", "value"),
    [
        (WindowETPO, "window", 0),
        (WarmUpETPO, "warm_up", -1),
        (AdaptiveBetaETPO, "target_kl", 0.0),
    ],
)
def test_values_out_of_range(build, variant, key, value):
    with pytest.raises(ConfigError, match=f"algorithm.{key}={value}"):
        build(variant, **{key: value})
