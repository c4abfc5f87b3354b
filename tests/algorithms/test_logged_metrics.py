"""Logged entropy, clip fraction, gradient norms and learning rates."""

from math import inf, log

import pytest
import torch
from lightning import Callback

from etpo.algorithms.losses import is_clipped
from etpo.algorithms.returns import entropy
from etpo.models.critics import HeadCritic

from .. import by_token
from ..by_token import gather_tokens

ALGORITHMS = ["etpo", "poad", "ppo_kl", "archer", "grpo"]


def test_entropy_by_hand():
    # 1/2 ln 2 + 2 1/4 ln 4 = 3/2 ln 2
    log_p = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.25] * 4, [1.0, 0.0, 0.0, 0.0]]).log()
    assert entropy(log_p).tolist() == pytest.approx([1.5 * log(2), log(4), 0.0])


def test_clipped_ratios_by_hand():
    ratios = torch.tensor([0.69, 0.71, 1.0, 1.19, 1.21])
    log_old = torch.full((5,), -2.0)
    log_pi = log_old + ratios.log()
    assert is_clipped(log_pi, log_old, 0.3).tolist() == [True] + [False] * 4
    assert is_clipped(log_pi, log_old, 0.2).tolist() == [True, True, False, False, True]
    assert not is_clipped(torch.tensor([-2.0, -inf]), torch.tensor([-2.0, -2.0]), None).any()


@torch.no_grad()
def log_ratios(module, batch):
    """log(pi/pi_old) of the taken tokens [B, L], with the support of pi_old."""
    policy, ids = module.policy, batch.action_ids
    old_hidden, taken = batch.tree.of_tokens(batch.states.old), ids[..., None]
    log_old = policy.log_probs(old_hidden, taken=taken, lm_head=module.old_lm_head).log_probs
    log_pi = by_token.log_probs(policy, *batch[:3], support=log_old.isfinite())
    return gather_tokens(log_pi, ids) - gather_tokens(log_old, ids)


class Gradients(Callback):
    """The norms of the gradients of every optimizer step, by group, and its learning rates."""

    def __init__(self):
        self.norms, self.rates = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        groups = [[p.grad.flatten() for p in g["params"]] for g in optimizer.param_groups]
        self.norms.append([float(torch.cat(group).norm()) for group in groups])
        self.rates.append([group["lr"] for group in optimizer.param_groups])


@pytest.mark.parametrize("chunk", [4096, 3])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_logged_metrics_are_means_over_the_iteration(
    algorithm, chunk, build_algorithm, make_policy, letter_env, fit, monkeypatch
):
    settings = {"logits_chunk_size": chunk, "max_kl": None, "policy_lr": 0.05}
    module = build_algorithm(algorithm, make_policy(min_p=0.01), HeadCritic, **settings)
    module.policy.stop_ids = list(range(3, 60))  # actions differ in length
    seen, entropies, gradients = [], [], Gradients()
    policy_loss, s = module.policy_loss, module.settings

    def record(batch):
        """Clipped steps and steps of a minibatch, by the policy's ratios."""
        mask = batch.step_mask
        difference = log_ratios(module, batch) * mask
        if algorithm == "ppo_kl":
            difference, mask = difference.sum(1, keepdim=True), mask[:, :1]
        ratio = difference.exp()
        clip = s.clip if s.clip_unit == "ratio" else s.clip / batch.old_log_probs.exp()
        clipped = ((ratio > 1 + clip) | (ratio < 1 - clip)) & mask
        seen.append((int(clipped.sum()), int(mask.sum())))
        return policy_loss(batch)

    monkeypatch.setattr(module, "policy_loss", record)

    @torch.no_grad()
    def computed(rollout, batch):
        log_pi = by_token.log_probs(module.policy, *batch[:3])[batch.step_mask]
        entropies.append(float(-(log_pi.exp() * log_pi.nan_to_num(neginf=0.0)).sum(-1).mean()))

    def watch(trainer, pl_module):
        trainer.datamodule.on_targets_computed = computed

    monkeypatch.setattr(gradients, "on_train_start", watch)
    sizes = {"minibatch_size": 4, "update_epochs": 3, "max_new_tokens": 7}
    data = fit(
        module,
        letter_env(2),
        1,
        callbacks=[gradients],
        trainer={"accumulate_grad_batches": 2, "limit_val_batches": 0},
        **sizes,
    )
    metrics = {name: float(value) for name, value in data.trainer.callback_metrics.items()}

    assert metrics["train/entropy"] == pytest.approx(entropies[0], rel=1e-4)
    clips, counts = (sum(column) for column in zip(*seen, strict=True))
    assert 0 < metrics["train/clip_fraction"] < 1
    assert metrics["train/clip_fraction"] == pytest.approx(clips / counts)
    assert len({count for _, count in seen}) > 1 or algorithm == "ppo_kl"

    assert len(gradients.norms) == 6  # optimizer steps
    names = ["policy", "critic"][: 1 if module.critic is None else 2]
    means = torch.tensor(gradients.norms).mean(0).tolist()
    norms = {f"train/grad_norm/{name}": mean for name, mean in zip(names, means, strict=True)}
    assert {n: v for n, v in metrics.items() if "grad_norm" in n} == pytest.approx(norms, rel=1e-4)
    assert metrics["train/lr/policy"] == pytest.approx(0.05)
    assert ("train/lr/critic" in metrics) == (module.critic is not None)
