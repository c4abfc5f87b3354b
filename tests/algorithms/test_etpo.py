import dataclasses

import pytest
import torch
from lightning import Callback

from etpo.algorithms import returns
from etpo.algorithms.etpo import ETPO
from etpo.errors import ConfigError
from etpo.models.critics import HeadCritic, TrunkCritic

from .. import by_token
from ..by_token import any_token, gather_tokens, whole_columns


class Rewards(Callback):
    def __init__(self):
        self.values = []

    def on_train_epoch_end(self, trainer, module):
        self.values.append(module.iteration_metrics["rollout/reward"])


@pytest.mark.parametrize("critic", [HeadCritic, TrunkCritic])
@pytest.mark.parametrize("doubly_robust", [True, False])
def test_nothing_moves_without_reward(build_etpo, letter_env, fit, paid, critic, doubly_robust):
    module = build_etpo(critic, doubly_robust=doubly_robust)
    before = [p.clone() for p in module.policy.trainable_parameters()]
    one_step = {"minibatch_size": 32, "update_epochs": 1}
    fit(module, paid(letter_env(4), lambda action: 0), 1, **one_step)
    for old, new in zip(before, module.policy.trainable_parameters(), strict=True):
        # what remains is the rounding of a float32 KL, the sampler's too; a real step is policy_lr
        torch.testing.assert_close(old, new, rtol=0, atol=1e-2 * module.settings.policy_lr)


def test_the_policy_moves_with_reward(build_etpo, letter_env, fit, paid):
    module = build_etpo()
    before = [p.clone() for p in module.policy.trainable_parameters()]
    fit(module, paid(letter_env(4), lambda action: sum(map(ord, action)) % 2), 1)
    pairs = zip(before, module.policy.trainable_parameters(), strict=True)
    assert max((old - new).abs().max() for old, new in pairs) > module.settings.policy_lr / 2


def test_it_learns(build_etpo, letter_env, fit):
    rewards = Rewards()
    fit(build_etpo(), letter_env(16), 25, [rewards], minibatch_size=32)
    assert rewards.values[0] < 0.1
    assert min(rewards.values[-3:]) > 0.5


def old_distributions(module, batch):
    """log pi_old, log pi_ref and Q [B, L, V] of a training batch."""
    with torch.no_grad():
        columns = whole_columns(module.policy, batch.states)
        found = module.old_distributions(batch.states, columns, batch.tree.fold)
    return tuple(batch.tree.of_tokens(each) for each in found)


def change(module, **settings):
    module.settings = dataclasses.replace(module.settings, **settings)


def test_tokens_below_min_p_have_no_gradient_and_no_nan(build_etpo, letter_env, fit):
    module = build_etpo(TrunkCritic, min_p=0.3)
    _, batch = fit(module, letter_env(8), 3).collect_targets()
    valid = batch.step_mask
    log_old, _, q = old_distributions(module, batch)
    support = log_old.isfinite()
    assert not support[valid].all()
    assert gather_tokens(support, batch.action_ids)[valid].all()
    for field in (batch.returns, batch.advantages, q[support]):
        assert field.isfinite().all()
    loss, metrics = module.policy_loss(batch)
    assert metrics["train/kl_to_old"][0].item() == pytest.approx(0, abs=1e-5)
    loss.backward()
    gradients = [p.grad for p in module.policy.trainable_parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_the_truncation_penalty_keeps_what_min_p_cut_off_unlikely(build_etpo, letter_env, fit):
    module = build_etpo(min_p=0.3, truncation_kl_coef=0.0)
    data = fit(module, letter_env(8), 1)
    batch = module.compute_targets(data.rollout)
    support, mask = old_distributions(module, batch)[0].isfinite(), batch.step_mask
    parameters = module.policy.trainable_parameters()

    def gradient(loss):
        parts = torch.autograd.grad(loss, parameters, allow_unused=True)
        return torch.cat([part.flatten() for part in parts if part is not None])

    without = gradient(module.policy_loss(batch)[0])
    change(module, truncation_kl_coef=0.7)
    added = gradient(module.policy_loss(batch)[0]) - without
    log_mass = by_token.distribution(module.policy, *batch[:3], support=support).log_support_mass
    expected = gradient(-0.7 * ((log_mass * mask).sum(1) * batch.weights).mean())
    assert expected.norm() > 1e-3
    torch.testing.assert_close(added, expected, rtol=1e-3, atol=1e-5)


def loop_returns(module, rollout, values, q_taken):
    """G [B, L] of V and of Q of the taken tokens, token by token from the ends backwards."""
    tree = rollout.bootstrap.tree()
    bootstrap = iter(
        module.evaluate(tree, module.prefix_states(tree, any_token(len(tree.node))))
        .value[:, 0]
        .tolist()
    )
    actions, num_envs = rollout.actions, rollout.num_envs
    gamma, lambda_ = module.settings.gamma, module.annealed_lambda(module.settings.lambda_)
    at_end = [next(bootstrap) if cut else 0.0 for cut in actions.truncated.tolist()]
    expected = torch.zeros_like(values)
    for env in range(num_envs):
        after = None  # (V, Q, G) of the token that follows in the same episode
        for row in reversed(range(env, len(values), num_envs)):
            length = int(actions.action_mask[row].sum())
            for j in reversed(range(length)):
                reward, discount = 0.0, 1.0
                if j == length - 1:
                    reward, discount = float(actions.rewards[row]), gamma
                if j == length - 1 and actions.terminated[row]:
                    expected[row, j] = reward
                elif j == length - 1 and actions.truncated[row]:
                    expected[row, j] = reward + gamma * at_end[row]
                else:
                    v, q, g = after
                    expected[row, j] = reward + discount * (v + lambda_ * (g - q))
                after = float(values[row, j]), float(q_taken[row, j]), float(expected[row, j])
    return expected


def test_lambda_returns_equal_a_loop_over_episodes(build_etpo, letter_env, fit, monkeypatch):
    module = build_etpo()
    rollout = fit(module, letter_env(3), 1, minibatch_size=6).rollout
    actions = rollout.actions
    _, old = module.start_iteration(rollout)
    generator = torch.Generator().manual_seed(0)
    values, q_taken = (torch.randn(old.value.shape, generator=generator) for _ in range(2))
    bootstrap = module.bootstrap_values(rollout)
    monkeypatch.setattr(module, "bootstrap_values", lambda rollout: bootstrap)
    old = old._replace(value=values, q_taken=q_taken)
    monkeypatch.setattr(module, "start_iteration", lambda rollout: (actions, old))
    batch = module.compute_targets(rollout)
    expected = loop_returns(module, rollout, values, q_taken)
    torch.testing.assert_close(batch.returns, expected, rtol=0, atol=1e-5)
    assert all(actions.truncated[env::3].sum() == 1 for env in range(3))
    assert bootstrap[actions.truncated].all()


def loop_baselines(rollout, errors):
    """Means over other environments' steps: of all, at the prompt, at the prefix; [B, L]."""
    actions, baselines = rollout.actions, torch.zeros_like(errors)
    steps = []
    for row, column in actions.action_mask.nonzero().tolist():
        prompt = tuple(actions.prompt_ids[row][actions.prompt_mask[row]].tolist())
        prefix = (*prompt, *actions.action_ids[row, :column].tolist())
        steps.append((row % rollout.num_envs, prompt, prefix, float(errors[row, column])))
    places = actions.action_mask.nonzero().tolist()
    for place, (env, *state, _) in zip(places, steps, strict=True):
        others = [step for step in steps if step[0] != env]
        baseline = sum(step[-1] for step in others) / len(others)
        for key in (0, 1):
            same = [step[-1] for step in others if step[1 + key] == state[key]]
            baseline = (sum(same) + baseline) / (len(same) + 1)
        baselines[tuple(place)] = baseline
    return baselines


def test_the_step_is_the_doubly_robust_gradient_of_the_rollout(
    build_etpo, letter_env, fit, assert_same_gradient
):
    module = build_etpo(
        TrunkCritic,
        beta=0.3,
        eta=0.2,
        pessimism_threshold=1.0,
        clip=0.01,
        truncation_kl_coef=0.0,
    )
    data = fit(module, letter_env(4), 3)
    _, batch = data.collect_targets()
    rollout = data.rollout
    actions, mask = rollout.actions, rollout.actions.action_mask
    inputs = actions.prompt_ids, actions.prompt_mask, actions.action_ids
    with torch.no_grad():
        log_old = by_token.log_probs(module.policy, *inputs)
        log_ref = by_token.log_probs(module.policy, *inputs, reference=True)
        value, scores = by_token.critic_outputs(module.target_critic, module.policy, *inputs)
        raw = value[..., None] + scores - (log_old.exp() * scores).sum(-1, keepdim=True)
        q = torch.minimum(raw, value[..., None])  # pessimism_threshold=1: of all tokens
        soft = (log_old.exp() * (q - module.beta * (log_old - log_ref))).sum(-1)

        def taken(x):
            return x.gather(-1, actions.action_ids[..., None])[..., 0]

        errors = (loop_returns(module, rollout, soft, taken(q)) - taken(q)) * mask
        advantages = errors - loop_baselines(rollout, errors)
        generator = torch.Generator().manual_seed(0)
        for parameter in module.policy.trainable_parameters():  # pi is no longer pi_old
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    log_pi = by_token.log_probs(module.policy, *inputs)
    cost = (module.beta * (log_pi - log_ref) + 0.2 * (log_pi - log_old) - q).detach()
    gain = (log_old.exp() * cost).sum(-1, keepdim=True) - cost
    each = (log_pi - log_old).exp()
    clip = 0.01 / log_old.exp()  # of the ratio, so that the probability changes by 0.01
    exact = torch.minimum(each * gain, each.clamp(1 - clip, 1 + clip) * gain)
    exact = (log_old.exp() * exact).sum(-1)
    ratio, clip = (taken(log_pi) - taken(log_old)).exp(), taken(clip)
    correction = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    losses = -(exact + correction) * mask
    expected = (0.9**actions.step * losses.sum(1)).mean()
    assert {True, False} == set((q < raw)[mask].flatten().tolist())
    assert (ratio < 1 - clip)[mask].any()
    assert (ratio > 1 + clip)[mask].any()
    assert len(actions.step.unique()) > 2
    loss, _ = module.policy_loss(batch)
    assert_same_gradient(loss, expected, module.policy.trainable_parameters(), 1e-3, 1e-6)

    value, scores = by_token.critic_outputs(module.critic, module.policy, *inputs)
    q_taken = taken(value[..., None] + scores) - (log_old.exp() * scores).sum(-1)
    size = (q_taken - batch.returns)[mask].abs()
    expected = torch.where(size < 1, size.square() / 2, size - 0.5).mean()
    loss, _ = module.critic_loss(batch)
    assert_same_gradient(loss, expected, list(module.critic.parameters()), 1e-3, 1e-6)


def test_scaling_keeps_the_direction_of_the_whole_objective(build_etpo, letter_env, fit, paid):
    module = build_etpo(normalize_by_advantage_rms=True)
    env = paid(letter_env(4), lambda action: sum(map(ord, action)) % 7 / 7)
    rollout = fit(module, env, 1).rollout

    def gradient(scaled):
        change(module, normalize_by_advantage_rms=scaled)
        module.scale = 1.0
        batch = module.compute_targets(rollout)
        loss, _ = module.policy_loss(batch)
        parts = torch.autograd.grad(loss, module.policy.trainable_parameters(), allow_unused=True)
        return torch.cat([part.flatten() for part in parts if part is not None]), batch

    plain, batch = gradient(False)
    scaled, _ = gradient(True)
    rms = batch.advantages[batch.step_mask].square().mean().sqrt()
    assert 0.01 < rms < 0.9
    torch.testing.assert_close(scaled, plain / rms, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("critic", [HeadCritic, TrunkCritic])
def test_a_batch_has_the_losses_of_its_selected_rows(
    build_etpo, letter_env, fit, assert_same_gradient, critic
):
    """Shared prefixes, orders and numbers of rows change nothing."""
    module = build_etpo(critic=critic, min_p=0.01, max_kl=None)
    data = fit(module, letter_env(6), 1, actions_per_iteration=42, minibatch_size=14)
    _, batch = data.collect_targets()
    with torch.no_grad():
        for parameter in module.policy.trainable_parameters():
            parameter += 0.01 * torch.randn(parameter.shape)
    order = torch.randperm(42, generator=torch.Generator().manual_seed(0))
    parts = [batch.select(rows) for rows in order.split([1, 20, 21])]
    assert len(batch.tree.node) < sum(len(part.tree.node) for part in parts)
    parameters = [p for p in module.parameters() if p.requires_grad]
    for step in (module.policy_loss, module.critic_loss):
        loss, metrics = step(batch)
        losses, others = zip(*map(step, parts), strict=True)
        mean = sum(each * len(part.weights) / 42 for each, part in zip(losses, parts, strict=True))
        torch.testing.assert_close(loss, mean, rtol=1e-5, atol=1e-6)
        assert_same_gradient(loss, mean, parameters, 1e-3, 1e-6)
        for name, (value, count) in metrics.items():
            means, counts = zip(*(other[name] for other in others), strict=True)
            assert sum(counts) == count, name
            total = sum(float(m.detach()) * c for m, c in zip(means, counts, strict=True))
            assert total / count == pytest.approx(float(value.detach()), rel=1e-4, abs=1e-6), name


def test_trust_region_leaves_a_stopped_policy_without_gradient(build_etpo, letter_env, fit):
    class Stopped(Callback):
        def __init__(self):
            self.moved, self.critic_moved = [], []

        def weights(self, module):
            policy = torch.cat([p.detach().flatten() for p in module.policy.trainable_parameters()])
            critic = torch.cat([p.detach().flatten() for p in module.critic.parameters()])
            return policy, critic

        def on_train_batch_start(self, trainer, module, batch, index):
            self.before = self.weights(module)

        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            policy, critic = self.weights(module)
            self.moved.append((module.kl_stopped, not torch.equal(policy, self.before[0])))
            self.critic_moved.append(not torch.equal(critic, self.before[1]))

    watch = Stopped()
    data = fit(build_etpo(max_kl=0.02), letter_env(8), 3, [watch])
    assert {stopped for stopped, _ in watch.moved} == {True, False}
    last = [stopped for stopped, _ in watch.moved[-len(watch.moved) // 3 :]]
    shown = data.trainer.callback_metrics["train/kl_stopped"]
    assert shown == pytest.approx(sum(last) / len(last))
    assert all(moved != stopped for stopped, moved in watch.moved)
    assert all(watch.critic_moved)


@pytest.mark.parametrize(("iters", "expected"), [(2, [0.5, 0.75, 1, 1]), (None, [0.5] * 4)])
def test_lambda_moves_to_one_over_the_iterations(
    iters, expected, build_etpo, letter_env, fit, monkeypatch
):
    used = []

    def spy(*inputs):
        used.append(float(inputs[4].max()))  # of the trace; both levels have one lambda
        return lambda_returns(*inputs)

    lambda_returns = returns.lambda_returns
    monkeypatch.setattr(returns, "lambda_returns", spy)
    fit(build_etpo(lambda_=0.5, lambda_anneal_iters=iters), letter_env(4), 4)
    assert used[::2] == used[1::2] == pytest.approx(expected)  # policy and critic


def test_beta_moves_linearly_over_the_iterations(build_etpo, letter_env, fit):
    class Betas(Callback):
        def __init__(self):
            self.values, self.logged = [], []

        def on_train_epoch_end(self, trainer, module):
            self.values.append(module.beta)
            self.logged.append(float(trainer.callback_metrics["train/beta"]))

    module = build_etpo(beta=0.4, beta_final_factor=0.25, beta_anneal_iters=3)
    betas = Betas()
    fit(module, letter_env(4), 5, callbacks=[betas])
    assert betas.values == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.1])
    assert betas.logged == pytest.approx(betas.values)


def test_target_critic_follows_once_per_iteration(build_etpo, letter_env, fit):
    module = build_etpo(tau=1.0)
    fit(module, letter_env(4), 1)
    pairs = zip(module.critic.parameters(), module.target_critic.parameters(), strict=True)
    assert all(torch.equal(new, target) for new, target in pairs)
    assert any(p.any() for p in module.target_critic.head.value.parameters())


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("beta", -0.1, "0 or more"),
        ("beta_final_factor", -1, "0 or more"),
        ("beta_anneal_iters", 0, "1 or more"),
        ("lambda_anneal_iters", 0, "1 or more"),
        ("gamma", 1.5, "at most 1"),
        ("tau", 0, "above 0"),
        ("clip", 2, "at most 1"),
        ("clip", 0, "above 0"),
        ("critic_loss", "l1", "huber, mse"),
        ("doubly_robust", 1, "true, false"),
        ("max_grad_norm", None, "above 0"),
        *(("logits_chunk_size", size, "1 or more") for size in (0, -1, 1.5, True, "all", None)),
    ],
)
def test_bad_values_stop_before_the_model_is_loaded(key, value, allowed):
    def policy():
        raise AssertionError("the model was loaded")

    with pytest.raises(ConfigError, match=rf"^algorithm\.{key}={value}: allowed .*{allowed}"):
        ETPO.from_config(policy, None, **{key: value})


def test_recorded_hidden_states_equal_a_forward_of_the_policy(build_etpo, letter_env, fit):
    module = build_etpo(TrunkCritic, min_p=0.01)
    data = fit(module, letter_env(6), 2)
    data.collect_targets()
    actions = data.rollout.actions
    tree, runs = actions.tree(), []
    module.policy.model.model.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        fields = actions.allowed, actions.support, actions.hidden_states
        recorded = [x.flatten(0, 1)[tree.first] for x in fields]
        given = module.evaluate(tree, module.prefix_states(tree, *recorded))
        assert not runs
        computed = module.evaluate(tree, module.prefix_states(tree, recorded[0]))
        assert runs
    torch.testing.assert_close(given.states.old, computed.states.old, rtol=1e-3, atol=1e-4)
    for name in ("log_pi", "q_taken", "value", "kl"):
        one, other = (getattr(a, name)[actions.action_mask] for a in (given, computed))
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("part", ["policy_loss", "critic_loss"])
def test_a_gradient_that_is_not_finite_is_never_stepped(
    build_etpo, fit, letter_env, monkeypatch, part
):
    module = build_etpo()
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    step = getattr(module, part)

    def spoiled(batch):
        loss, metrics = step(batch)
        return loss * float("nan" if part == "policy_loss" else "inf"), metrics

    monkeypatch.setattr(module, part, spoiled)
    with pytest.raises(ConfigError, match="gradient norm is (nan|inf) in iteration 1"):
        fit(module, letter_env(4), 1)
    for name, weight in module.state_dict().items():
        assert torch.equal(weight, before[name]), name
