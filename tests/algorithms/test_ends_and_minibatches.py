"""Ends of actions and episodes, and means over minibatches whose actions differ in length."""

import numpy as np
import pytest
import torch

from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import CompletionTemplate
from etpo.rollout.collector import collect
from etpo.rollout.trajectories import trajectory_steps

STOPS = list(range(3, 60))  # of 259 tokens: some actions end by a stop token, others by their limit


def collected(checkpoint, env, rounds, stops):
    policy = LanguageModelPolicy(str(checkpoint("llama")), CompletionTemplate())
    policy.stop_ids = [*policy.stop_ids, *stops]
    return collect(policy, env, rounds, 6, torch.Generator().manual_seed(0), seed=0), policy


def test_the_last_token_of_an_action_is_a_step_and_has_the_reward(checkpoint, letter_env):
    """It is a stop token or, where the token limit cut the action, any other."""
    played, policy = collected(checkpoint, letter_env(30), 1, STOPS)
    actions = played.actions._replace(rewards=torch.arange(1.0, 31))
    assert torch.equal(actions.step_mask, actions.action_mask)
    lengths = actions.action_mask.sum(1)
    last = actions.action_ids.gather(1, lengths[:, None] - 1)[:, 0]
    stopped = torch.isin(last, torch.tensor(policy.stop_ids))
    assert {True, False} == set(stopped.tolist())
    assert (lengths[~stopped] == 6).all()
    steps = trajectory_steps(actions, actions.step_mask, 30, 0.9)
    assert torch.equal(steps.rewards.gather(1, lengths[:, None] - 1)[:, 0], actions.rewards)
    assert torch.equal(steps.rewards.sum(1), actions.rewards)


@pytest.fixture
def time_limit(letter_env):
    """time_limit(num_envs): episodes that a limit of two actions truncates."""

    class TimeLimit(letter_env):
        def step_part(self, actions, envs):
            following, rewards, done, _, infos = super().step_part(actions, envs)
            return following, rewards, np.zeros_like(done), done, infos

    return lambda num_envs: TimeLimit(num_envs, length=2)


def test_a_time_limit_bootstraps_at_the_observation_before_the_reset(checkpoint, time_limit):
    """The observation that the environment returns is the first one of the next episode."""
    played, policy = collected(checkpoint, time_limit(3), 4, ())
    actions, bootstrap = played.actions, played.bootstrap
    assert actions.truncated.tolist() == ([False] * 3 + [True] * 3) * 2
    assert not actions.terminated.any()
    ends = [r for r, cut in zip(played.records, actions.truncated, strict=True) if cut]
    shown = [
        policy.tokenizer.decode(ids[mask])
        for ids, mask in zip(bootstrap.prompt_ids, bootstrap.prompt_mask, strict=True)
    ]
    assert shown == [f"go{record.action[:2]}" for record in ends]
    assert "go" not in shown  # after the reset
    following = [r.prompt for r in played.records[6:9]]
    assert following == ["go"] * 3


def with_lengths(batch):
    """Return the batch with actions cut to one to five tokens, short ones first."""
    count = len(batch.weights)
    lengths = torch.arange(count) * 5 // count + 1
    mask = batch.step_mask & (torch.arange(batch.step_mask.shape[1]) < lengths[:, None])
    numbers = ("old_log_probs", "ref_log_probs", "advantages", "returns")
    cut = {name: getattr(batch, name) * mask for name in numbers}
    cut["advantages"] = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    return batch._replace(step_mask=mask, **cut).select(torch.arange(count))


@pytest.mark.parametrize("name", ["etpo", "poad", "ppo_kl", "reinforce", "grpo"])
def test_a_loss_is_the_mean_of_its_minibatches(
    name, build_etpo, build_baseline, letter_env, fit, paid
):
    """A mean over the tokens of each minibatch would weight the tokens of short actions more."""
    build = build_etpo if name == "etpo" else lambda: build_baseline(name)
    env = paid(letter_env(4), lambda action: sum(map(ord, action)) % 7 / 7)
    data = fit(module := build(), env, 2, minibatch_size=32, update_epochs=1)
    data.collect_targets()
    batch = with_lengths(module.compute_targets(data.rollout))
    module.mean_length = float(batch.step_mask.sum(1).float().mean())
    parts = [batch.select(rows) for rows in torch.arange(len(batch.weights)).chunk(4)]
    tokens = torch.stack([part.step_mask.sum() for part in parts])
    assert tokens.max() > 2 * tokens.min()
    for step in (module.policy_loss, module.critic_loss):
        loss, metrics = step(batch)
        losses = torch.stack([step(part)[0] for part in parts])
        torch.testing.assert_close(losses.mean(), loss, rtol=1e-4, atol=1e-6)
        if metrics:
            by_tokens = (losses / tokens).mean() * tokens.float().mean()
            assert (by_tokens - loss).abs() > 1e-2 * loss.abs()
