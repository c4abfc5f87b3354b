import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from etpo.algorithms.base import OnPolicyAlgorithm
from etpo.errors import ConfigError
from etpo.models.critics import HeadCritic
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import CompletionTemplate
from etpo.rollout.buffer import OnPolicyBuffer
from etpo.rollout.datamodule import RolloutDataModule
from etpo.rollout.replay import ReplayWindow
from etpo.rollout.types import Actions, Decisions, Rollout

from ..algorithms.conftest import ALGORITHMS

REPLAYING = ["etpo", "ppo_kl", "poad", "ntpo", "grpo", "rloo", "gigpo", "reinforce"]
TIMED = ["etpo", "ppo_kl", "poad", "grpo", "gigpo"]


def rollout_of(number, length, cut=True):
    """Two actions of `length` tokens, all with the id `number`; the second one is truncated."""
    ids = torch.full((2, length), number)
    mask = torch.ones_like(ids, dtype=torch.bool)
    zeros, flags = torch.zeros(2), torch.tensor([False, cut])
    sets = torch.zeros(2, length, 0, dtype=torch.int32)
    states = torch.ones(2, length, 3)
    actions = Actions(
        *(ids, mask, ids, mask, mask, states, sets, sets), zeros, ~flags, flags, zeros.long()
    )
    decisions = Decisions(ids[1:], mask[1:], ids[1:], mask[1:], sets[1:])
    return Rollout(actions, decisions if cut else None, [], 2, 0, 0.0, 0.0)


def test_the_fresh_actions_come_first_and_the_oldest_are_dropped():
    window = ReplayWindow(3, 2)
    for number, length in ((5, 2), (6, 4), (7, 3)):
        window.append(rollout_of(number, length), torch.full((2, length), -float(number)))
    fresh = rollout_of(8, 1, cut=False)
    extended = window.extended(fresh, pad_id=0)
    assert extended.actions.action_ids.tolist() == [
        *[[8, 0, 0, 0]] * 2,
        *[[7, 7, 7, 0]] * 2,
        *[[6, 6, 6, 6]] * 2,
    ]
    assert extended.actions.prompt_ids[2].tolist() == [0, 7, 7, 7]
    assert extended.num_fresh == 2
    assert extended.replayed_log_mu.tolist() == [[-7, -7, -7, 0]] * 2 + [[-6] * 4] * 2
    assert extended.bootstrap.prompt_ids.tolist() == [[0, 7, 7, 7], [6] * 4]
    assert extended.actions.truncated.nonzero().flatten().tolist() == [3, 5]
    assert extended.actions.hidden_states.numel() == 0
    assert fresh.num_fresh == 2


def test_a_window_of_one_keeps_nothing():
    window, fresh = ReplayWindow(1, 2), rollout_of(5, 2)
    window.append(fresh, torch.zeros(2, 2))
    assert not window.past
    assert window.extended(fresh, pad_id=0) is fresh


def test_a_window_of_another_size_takes_the_latest_iterations():
    old, window = ReplayWindow(4, 2), ReplayWindow(2, 2)
    for number in (5, 6, 7):
        old.append(rollout_of(number, 2, cut=number < 7), torch.zeros(2, 2))
    window.load_state_dict(old.state_dict())
    extended = window.extended(rollout_of(8, 2), pad_id=0)
    assert extended.actions.action_ids[:, 0].tolist() == [8, 8, 7, 7]


def test_iterations_of_another_number_of_environments_are_dropped():
    old, window = ReplayWindow(2, 2), ReplayWindow(2, 1)
    old.append(rollout_of(5, 2), torch.zeros(2, 2))
    window.load_state_dict(old.state_dict())
    assert not window.past


def test_iterations_of_another_number_of_actions_are_dropped():
    window, fresh = ReplayWindow(2, 2), rollout_of(5, 2)
    window.append(rollout_of(4, 2), torch.zeros(2, 2))
    one = fresh._replace(actions=fresh.actions.select(torch.tensor([0])))
    assert window.extended(one, pad_id=0) is one
    assert not window.past


def test_every_minibatch_has_actions_of_every_iteration():
    class Numbers(tuple):
        def select(self, rows):
            return self[0][rows].tolist()

    def fill():
        yield Numbers([torch.arange(12)]), 2  # two iterations of six

    buffer = OnPolicyBuffer(fill, torch.Generator, batches_per_epoch=2, minibatch_size=3, epochs=2)
    minibatches = list(buffer)
    for first, second in zip(minibatches[::2], minibatches[1::2], strict=True):
        assert sorted(first + second) == list(range(12))
    assert all(len(each) == 6 for each in minibatches)
    assert all(sum(row < 6 for row in each) == 3 for each in minibatches)


@pytest.fixture
def build(checkpoint):
    """build(name, ...): an algorithm on a small random model, the same every time."""

    def make(name, min_p=0.0, **changes):
        torch.manual_seed(0)
        algorithm, settings = ALGORITHMS[name]
        critic = None
        if algorithm.critic_head is not None:

            def critic(policy, head):
                return HeadCritic(policy, 16, head)

        return algorithm.from_config(
            lambda: LanguageModelPolicy(
                str(checkpoint("llama")), CompletionTemplate(), min_p=min_p
            ),
            critic,
            **(settings | {"max_kl": None} | changes),
        )

    return make


def train(module, env, iterations, folder, ckpt_path=None, **sizes):
    data = RolloutDataModule(
        env,
        **{"actions_per_iteration": 8, "minibatch_size": 4, "update_epochs": 2, "max_new_tokens": 4}
        | {"num_envs": env.num_envs, "replay_window": 3}
        | sizes,
    )
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    saved = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    Trainer(
        max_epochs=iterations,
        accelerator="cpu",
        num_sanity_val_steps=0,
        callbacks=[saved],
        limit_val_batches=0,
        **options,
    ).fit(module, data, ckpt_path=ckpt_path)
    return data


@pytest.mark.parametrize("name", TIMED)
def test_a_resumed_run_with_a_window_is_the_uninterrupted_one(build, letter_env, name, tmp_path):
    whole, resumed = build(name), build(name)
    train(whole, letter_env(4), 4, tmp_path)
    train(build(name), letter_env(4), 2, tmp_path)
    train(resumed, letter_env(4), 4, tmp_path, ckpt_path=tmp_path / "last.ckpt")
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    without = build(name)
    train(without, letter_env(4), 4, tmp_path, replay_window=1)
    pairs = zip(whole.parameters(), without.parameters(), strict=True)
    assert not all(torch.equal(one, other) for one, other in pairs)


def test_a_checkpoint_without_optimizer_has_no_window(build, letter_env, tmp_path):
    module = build("etpo")
    data = train(module, letter_env(4), 2, tmp_path)
    data.attached_trainer.save_checkpoint(tmp_path / "best.ckpt", weights_only=True)
    saved, whole = (
        torch.load(tmp_path / name, weights_only=True) for name in ("best.ckpt", "last.ckpt")
    )
    assert "replay" not in saved.get("RolloutDataModule", {})
    assert len(whole["RolloutDataModule"]["replay"][0]["past"]) == 2


@pytest.mark.parametrize("min_p", [0.0, 0.1])
@pytest.mark.parametrize("name", REPLAYING)
def test_replayed_actions_are_evaluated_again(build, letter_env, name, min_p, tmp_path):
    """By the present policy, with the weights min(1, pi_old/mu)."""
    module = build(name, min_p=min_p)
    data = train(module, letter_env(4), 3, tmp_path)
    rollout, batch = data.collect_targets()
    mask, fresh = batch.step_mask, rollout.num_fresh
    assert len(mask) == 3 * fresh
    with torch.no_grad():
        log_pi, _ = module.taken_log_probs(batch)
    torch.testing.assert_close(batch.old_log_probs, log_pi, rtol=1e-4, atol=1e-4)
    ratios = (log_pi[fresh:] - rollout.replayed_log_mu).exp()
    if name == "ppo_kl":  # of whole actions
        ratios = ratios.prod(1, keepdim=True).expand_as(ratios)
    weights = batch.sample_weights[fresh:][mask[fresh:]]
    torch.testing.assert_close(weights, ratios[mask[fresh:]].clamp(max=1), rtol=1e-3, atol=1e-3)
    assert weights.min() < 0.999
    assert (batch.sample_weights[:fresh][mask[:fresh]] == 1).all()
    assert 0 < module.iteration_metrics["rollout/replay_ratio"] <= 1
    loss, _ = module.policy_loss(batch)
    gradients = torch.autograd.grad(loss, module.policy.trainable_parameters(), allow_unused=True)
    assert all(g.isfinite().all() for g in gradients if g is not None)


@pytest.mark.parametrize("name", REPLAYING)
def test_sampled_terms_are_weighted(build, letter_env, name, tmp_path):
    """With weights of 0 only the terms without a sample remain: the exact term and truncation."""
    module = build(name, **({"kl_in_loss": False} if name in ("grpo", "gigpo") else {}))
    data = train(module, letter_env(4), 2, tmp_path)
    _, batch = data.collect_targets()
    weighted, _ = module.policy_loss(batch)
    none = torch.zeros_like(batch.sample_weights)
    zero, _ = module.policy_loss(batch._replace(sample_weights=none))
    equal, _ = module.policy_loss(batch._replace(advantages=none))
    assert zero == equal != weighted


@pytest.mark.parametrize("name", ["etpo", "poad", "ppo_kl"])
def test_ratios_enter_returns_and_advantages_of_replayed_actions(
    build, letter_env, name, tmp_path, monkeypatch
):
    module = build(name)
    rollout, batch = train(module, letter_env(4), 3, tmp_path).collect_targets()
    monkeypatch.setattr(module, "replay_ratios", lambda rollout, old: torch.ones_like(old.log_pi))
    without, fresh = module.compute_targets(rollout), rollout.num_fresh
    torch.testing.assert_close(without.returns[:fresh], batch.returns[:fresh])
    for one, other in ((without.returns, batch.returns), (without.advantages, batch.advantages)):
        assert (one - other)[fresh:].abs().max() > 1e-4


@pytest.mark.parametrize("name", ["poad", "grpo", "ppo_kl"])
def test_the_sampled_kl_is_weighted(build, letter_env, name, tmp_path):
    """Replayed tokens are no samples of pi_old."""
    module = build(name)
    _, batch = train(module, letter_env(4), 2, tmp_path).collect_targets()
    with torch.no_grad():
        for parameter in module.policy.trainable_parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    log_pi, _ = module.taken_log_probs(batch)
    difference = log_pi.detach() - batch.old_log_probs
    each = (difference.exp() - difference - 1) * batch.step_mask * batch.sample_weights
    _, metrics = module.policy_loss(batch)
    assert (batch.sample_weights[batch.step_mask] < 0.99).any()
    assert metrics["train/kl_to_old"][0] == pytest.approx(each.sum(1).mean().item(), rel=1e-4)


@pytest.mark.parametrize("name", ["grpo", "gigpo"])
def test_the_kl_in_the_loss_is_weighted(build, letter_env, name, tmp_path):
    module = build(name)
    _, batch = train(module, letter_env(4), 3, tmp_path).collect_targets()
    none = torch.zeros_like(batch.sample_weights)
    batch = batch._replace(advantages=none)
    weighted, _ = module.policy_loss(batch)
    without, _ = module.policy_loss(batch._replace(sample_weights=none))
    assert without != weighted


@pytest.mark.parametrize("name", ["etpo", "poad"])
def test_log_mu_is_of_the_distribution_that_sampled(build, letter_env, name, tmp_path):
    module = build(name)
    data = train(module, letter_env(4), 3, tmp_path)
    data.collect_targets()
    actions, log_mu = data.rollout.actions, data.replay.past[-1][-1]
    with torch.no_grad():  # before the policy moves
        log_probs, _ = module.policy.log_probs(actions.hidden_states.to(module.device))
    expected = log_probs.gather(-1, actions.action_ids[..., None].to(module.device))[..., 0].cpu()
    mask = actions.step_mask
    torch.testing.assert_close(log_mu[mask], expected[mask], rtol=1e-4, atol=1e-4)


def test_an_algorithm_without_replay_refuses_a_window(build, letter_env, tmp_path):
    with pytest.raises(ConfigError, match=r"replay.window=3: allowed with ArCHer is 1"):
        train(build("archer"), letter_env(4), 1, tmp_path)
    assert not OnPolicyAlgorithm.replays
