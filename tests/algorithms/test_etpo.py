import pytest
import torch
from lightning import Callback

from etpo.algorithms import returns as soft_bellman
from etpo.algorithms.etpo import ETPO
from etpo.errors import ConfigError
from etpo.models.critics import HeadCritic, TrunkCritic


class Rewards(Callback):
    def __init__(self):
        self.values = []

    def on_train_epoch_end(self, trainer, module):
        self.values.append(module.rollout_metrics["rollout/reward"])


@pytest.mark.parametrize("critic", [HeadCritic, TrunkCritic])
@pytest.mark.parametrize("doubly_robust", [True, False])
def test_nothing_moves_without_reward(build_etpo, letter_env, fit, paid, critic, correction):
    module = build_etpo(critic, doubly_robust=correction)
    before = [p.clone() for p in module.policy.trainable_parameters()]
    one_step = {"minibatch_size": 32, "update_epochs": 1}
    fit(module, paid(letter_env(4), lambda action: 0), 1, **one_step)
    for old, new in zip(before, module.policy.trainable_parameters(), strict=True):
        # what remains is the rounding of a float32 KL, the sampler's too; a real step is policy_lr
        torch.testing.assert_close(old, new, rtol=0, atol=1e-2 * module.policy_lr)


def test_the_policy_moves_with_reward(build_etpo, letter_env, fit, paid):
    module = build_etpo()
    before = [p.clone() for p in module.policy.trainable_parameters()]
    fit(module, paid(letter_env(4), lambda action: sum(map(ord, action)) % 2), 1)
    pairs = zip(before, module.policy.trainable_parameters(), strict=True)
    assert max((old - new).abs().max() for old, new in pairs) > module.policy_lr / 2


def test_it_learns(build_etpo, letter_env, fit):
    rewards = Rewards()
    fit(build_etpo(), letter_env(16), 25, [rewards], minibatch_size=32)
    assert rewards.values[0] < 0.1
    assert min(rewards.values[-3:]) > 0.5


def test_tokens_below_min_p_take_no_part(build_etpo, letter_env, fit):
    module = build_etpo(TrunkCritic, min_p=0.3)
    batch, _ = fit(module, letter_env(8), 3).fill()
    valid = batch.action_mask
    support = batch.old_log_probs.isfinite()
    assert not support[valid].all()
    taken = batch.action_ids.unsqueeze(-1)
    assert support.gather(-1, taken)[valid].all()
    for field in (batch.returns, batch.advantages, batch.q[support]):
        assert field.isfinite().all()
    module.log_mean = lambda *_: None
    loss, kl = module.policy_step(batch)
    assert kl.item() == pytest.approx(0, abs=1e-5)
    loss.backward()
    gradients = [p.grad for p in module.policy.trainable_parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_the_leak_term_keeps_what_min_p_cut_off_unlikely(build_etpo, letter_env, fit):
    module = build_etpo(min_p=0.3, truncation_kl_coef=0.0)
    data = fit(module, letter_env(8), 1)
    module.log_mean = lambda *_: None
    batch = module.compute_targets(data.rollout)
    support, mask = batch.old_log_probs.isfinite(), batch.action_mask
    inputs = batch.prompt_ids, batch.prompt_mask, batch.action_ids
    parameters = module.policy.trainable_parameters()

    def gradient(loss):
        parts = torch.autograd.grad(loss, parameters, allow_unused=True)
        return torch.cat([part.flatten() for part in parts if part is not None])

    without = gradient(module.policy_step(batch)[0])
    module.truncation_kl_coef = 0.7
    leaked = gradient(module.policy_step(batch)[0]) - without
    log_kept = module.policy(*inputs, support=support).log_kept
    expected = gradient(-0.7 * ((log_kept * mask).sum(1) * batch.weights).mean())
    assert expected.norm() > 1e-3
    torch.testing.assert_close(leaked, expected, rtol=1e-3, atol=1e-5)


def loop_returns(module, rollout, values, q_taken):
    """G [B, L] of V and of Q of the taken tokens, token by token from the ends backwards."""
    actions, num_envs = rollout.actions, rollout.num_envs
    gamma, lambda_ = module.gamma, module.lambda_
    prompts = rollout.bootstrap_ids, rollout.bootstrap_mask
    bootstrap = iter(module.evaluate_prefixes(*prompts, prompts[0][:, :1]).value[:, 0].tolist())
    at_end = [next(bootstrap) if cut else 0.0 for cut in actions.truncated.tolist()]
    returns = torch.zeros_like(values)
    for env in range(num_envs):
        after = None  # (V, Q, G) of the token that follows in the same episode
        for row in reversed(range(env, len(values), num_envs)):
            length = int(actions.action_mask[row].sum())
            for j in reversed(range(length)):
                reward, discount = 0.0, 1.0
                if j == length - 1:
                    reward, discount = float(actions.rewards[row]), gamma
                if j == length - 1 and actions.terminated[row]:
                    expected = reward
                elif j == length - 1 and actions.truncated[row]:
                    expected = reward + gamma * at_end[row]
                else:
                    v, q, g = after
                    expected = reward + discount * (v + lambda_ * (g - q))
                returns[row, j] = expected
                after = float(values[row, j]), float(q_taken[row, j]), expected
    return returns


def test_lambda_returns_equal_a_loop_over_episodes(build_etpo, letter_env, fit):
    module = build_etpo()
    rollout = fit(module, letter_env(3), 1, minibatch_size=6).rollout
    actions = rollout.actions
    generator = torch.Generator().manual_seed(0)
    shape = actions.action_mask.shape
    values, q_taken = (torch.randn(shape, generator=generator) for _ in range(2))
    returns = module.lambda_returns(actions, values, q_taken, rollout) * actions.action_mask
    expected = loop_returns(module, rollout, values, q_taken)
    torch.testing.assert_close(returns, expected, rtol=0, atol=1e-5)
    assert all(actions.truncated[env::3].sum() == 1 for env in range(3))


def test_the_step_is_the_doubly_robust_gradient_of_the_rollout(
    build_etpo, letter_env, fit, assert_same_gradient
):
    module = build_etpo(
        TrunkCritic,
        beta=0.3,
        eta=0.2,
        pessimism_threshold=1.0,
        clip_low=0.05,
        clip_high=0.2,
        truncation_kl_coef=0.0,
    )
    data = fit(module, letter_env(4), 3)
    batch, _ = data.fill()
    rollout = data.rollout
    module.log_mean = lambda *_: None
    actions, mask = rollout.actions, rollout.actions.action_mask
    inputs = actions.prompt_ids, actions.prompt_mask, actions.action_ids
    with torch.no_grad():
        log_old = module.policy(*inputs).log_probs
        log_ref, features, _ = module.policy(*inputs, reference=True)
        value, scores = module.target_critic(*inputs, features)
        raw = value[..., None] + scores - (log_old.exp() * scores).sum(-1, keepdim=True)
        q = torch.minimum(raw, value[..., None])  # pessimism_threshold=1: of all tokens
        soft = (log_old.exp() * (q - module.beta * (log_old - log_ref))).sum(-1)

        def taken(x):
            return x.gather(-1, actions.action_ids[..., None])[..., 0]

        errors = (loop_returns(module, rollout, soft, taken(q)) - taken(q)) * mask
        env = torch.arange(len(errors)) % rollout.num_envs
        others = [errors[env != n].sum() / mask[env != n].sum() for n in env.tolist()]
        advantages = errors - torch.stack(others)[:, None]
        generator = torch.Generator().manual_seed(0)
        for parameter in module.policy.trainable_parameters():  # pi is no longer pi_old
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    log_pi = module.policy(*inputs).log_probs
    cost = module.beta * (log_pi - log_ref) + module.eta * (log_pi - log_old) - q
    ratio = (taken(log_pi) - taken(log_old)).exp()
    correction = torch.minimum(ratio * advantages, ratio.clamp(0.95, 1.2) * advantages)
    losses = ((log_pi.exp() * cost).sum(-1) - correction) * mask
    expected = (module.gamma**actions.step * losses.sum(1)).mean()
    assert {True, False} == set((q < raw)[mask].flatten().tolist())
    assert (ratio[mask] < 0.95).any()
    assert (ratio[mask] > 1.2).any()
    assert len(actions.step.unique()) > 2
    step, _ = module.policy_step(batch)
    assert_same_gradient(step, expected, module.policy.trainable_parameters(), 1e-3, 1e-6)


def test_scaling_keeps_the_direction_of_the_whole_objective(build_etpo, letter_env, fit, paid):
    module = build_etpo(normalize_by_advantage_rms=True)
    env = paid(letter_env(4), lambda action: sum(map(ord, action)) % 7 / 7)
    rollout = fit(module, env, 1).rollout
    module.log_mean = lambda *_: None

    def gradient(scaled):
        module.normalize_by_advantage_rms, module.scale = scaled, 1.0
        batch = module.compute_targets(rollout)
        loss, _ = module.policy_step(batch)
        parts = torch.autograd.grad(loss, module.policy.trainable_parameters(), allow_unused=True)
        return torch.cat([part.flatten() for part in parts if part is not None]), batch

    plain, batch = gradient(False)
    scaled, _ = gradient(True)
    rms = batch.advantages[batch.action_mask].square().mean().sqrt()
    assert 0.01 < rms < 0.9
    torch.testing.assert_close(scaled, plain / rms, rtol=1e-3, atol=1e-5)


def test_grouping_actions_by_length_changes_nothing(
    build_etpo, letter_env, fit, assert_same_gradient
):
    module = build_etpo(critic=TrunkCritic, max_kl=None)  # else the policy may rest already
    data = fit(module, letter_env(6), 1, actions_per_iteration=42, minibatch_size=14)
    batch = module.compute_targets(data.rollout)
    lengths = torch.arange(42) % 5 + 1
    batch = batch._replace(action_mask=torch.arange(5) < lengths[:, None])
    logged = {}
    module.log_mean = lambda name, value, count: logged.setdefault(name, []).append(
        (float(value), count)
    )
    loss = module.training_step(batch, batch_idx=1)
    (kl,) = module.step_kls
    counts = [count for _, count in logged["train/policy_loss"]]
    assert len(counts) > 1
    assert sum(counts) == 42
    policy_loss, expected_kl = module.policy_step(batch)
    expected = module.critic_step(batch) + policy_loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kl, expected_kl, rtol=1e-5, atol=1e-7)
    parameters = [p for p in module.parameters() if p.requires_grad]
    assert_same_gradient(loss, expected, parameters, 1e-4, 1e-6)


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
            self.moved.append((module.policy_stopped, not torch.equal(policy, self.before[0])))
            self.critic_moved.append(not torch.equal(critic, self.before[1]))

    watch = Stopped()
    fit(build_etpo(max_kl=0.02), letter_env(8), 3, [watch])
    assert {stopped for stopped, _ in watch.moved} == {True, False}
    assert all(moved != stopped for stopped, moved in watch.moved)
    assert all(watch.critic_moved)


@pytest.mark.parametrize(("iters", "expected"), [(2, [0.5, 0.75, 1, 1]), (None, [0.5] * 4)])
def test_lambda_moves_to_one_over_the_iterations(
    iters, expected, build_etpo, letter_env, fit, monkeypatch
):
    used = []

    def spy(*inputs):
        used.append(inputs[4])
        return lambda_returns(*inputs)

    lambda_returns = soft_bellman.lambda_returns
    monkeypatch.setattr(soft_bellman, "lambda_returns", spy)
    fit(build_etpo(lambda_=0.5, lambda_anneal_iters=iters), letter_env(4), 4)
    assert used == pytest.approx(expected)


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


def test_checkpoints_leave_out_the_frozen_reference(build_etpo, letter_env, fit):
    module = build_etpo()
    saved = {"state_dict": module.state_dict(), "optimizer_states": []}
    module.on_save_checkpoint(saved)
    keys = saved["state_dict"]
    assert not any(key.startswith("policy.reference_model.") for key in keys)
    trained = {f"policy.model.{n}" for n, _ in module.policy.model.named_parameters()}
    assert trained <= set(keys)
    assert any(key.startswith("target_critic.") for key in keys)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("beta", -0.1, "algorithm.beta=-0.1: allowed is a number, 0 or more"),
        ("beta_final_factor", -1, "algorithm.beta_final_factor=-1: allowed is a number, 0 or more"),
        ("beta_anneal_iters", 0, "algorithm.beta_anneal_iters=0: allowed is 1 or more, an integer"),
        (
            "lambda_anneal_iters",
            0,
            "algorithm.lambda_anneal_iters=0: allowed is 1 or more, an integer",
        ),
        ("gamma", 1.5, "algorithm.gamma=1.5: allowed is a number, 0 or more and at most 1"),
        ("tau", 0, "algorithm.tau=0: allowed is a number, above 0 and at most 1"),
        ("clip_low", 2, "algorithm.clip_low=2: allowed is a number, above 0 and at most 1"),
        ("clip_high", 0, "algorithm.clip_high=0: allowed is a number, above 0"),
        ("critic_loss", "l1", "algorithm.critic_loss=l1: allowed are huber, mse"),
    ],
)
def test_bad_values_stop_before_the_model_is_loaded(key, value, message, etpo_settings):
    def policy():
        raise AssertionError("the model was loaded")

    with pytest.raises(ConfigError, match=message):
        ETPO(policy, None, None, **(etpo_settings | {key: value}))


def test_the_sampled_states_stand_for_a_forward_of_the_policy(build_etpo, letter_env, fit):
    module = build_etpo(TrunkCritic, min_p=0.01)
    data = fit(module, letter_env(6), 2)
    data.fill()
    actions = data.rollout.actions
    inputs = actions.prompt_ids, actions.prompt_mask, actions.action_ids
    runs = []
    module.policy.model.model.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        given = module.evaluate_prefixes(*inputs, actions.features)
        assert not runs
        computed = module.evaluate_prefixes(*inputs)
        assert runs
    for name in ("log_pi", "rebased_q", "q_taken", "value", "kl"):
        one, other = (getattr(a, name)[actions.action_mask] for a in (given, computed))
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("part", ["policy_step", "critic_step"])
def test_a_gradient_that_is_not_finite_is_never_stepped(
    build_etpo, fit, letter_env, monkeypatch, part
):
    module = build_etpo()
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    step = getattr(module, part)

    def spoiled(batch):
        loss = step(batch)
        return (loss[0] * float("nan"), loss[1]) if part == "policy_step" else loss * float("inf")

    monkeypatch.setattr(module, part, spoiled)
    with pytest.raises(ConfigError, match="gradient norm is (nan|inf) in iteration 1"):
        fit(module, letter_env(4), 1)
    for name, weight in module.state_dict().items():
        assert torch.equal(weight, before[name]), name
