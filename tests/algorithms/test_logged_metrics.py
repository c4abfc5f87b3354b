"""What a training step logs beside its losses: entropy, clip fraction, gradient norms, rates."""

from math import inf, log

import pytest
import torch
from etpo.algorithms.poad import POAD
from etpo.algorithms.ppo_kl import PPOKL
from etpo.algorithms.variants import JointClipETPO
from lightning import Callback

from etpo.algorithms.archer import ArCHer
from etpo.algorithms.etpo import ETPO
from etpo.algorithms.losses import clipped
from etpo.algorithms.reinforce import GRPO
from etpo.algorithms.returns import entropy
from etpo.models.critics import HeadCritic
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import CompletionTemplate

ALGORITHMS = [ETPO, JointClipETPO, POAD, PPOKL, ArCHer, GRPO]


def test_entropy_by_hand():
    # 1/2 ln 2 + 2 1/4 ln 4 = 3/2 ln 2, whatever has no probability
    log_p = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.25] * 4, [1.0, 0.0, 0.0, 0.0]]).log()
    assert entropy(log_p).tolist() == pytest.approx([1.5 * log(2), log(4), 0.0])


def test_clipped_ratios_by_hand():
    ratios = torch.tensor([0.69, 0.71, 1.0, 1.19, 1.21])
    log_old = torch.full((5,), -2.0)
    log_pi = log_old + ratios.log()
    assert clipped(log_pi, log_old, 0.3, 0.2).tolist() == [True, False, False, False, True]
    assert clipped(log_pi, log_old, None, 0.2).tolist() == [False] * 4 + [True]
    assert clipped(log_pi, log_old, 0.3, None).tolist() == [True] + [False] * 4
    assert not clipped(torch.tensor([-2.0, -inf]), torch.tensor([-2.0, -2.0]), None, None).any()


class Gradients(Callback):
    """The norms of the gradients of every optimizer step, by group, and its learning rates."""

    def __init__(self):
        self.norms, self.rates = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        groups = [[p.grad.flatten() for p in g["params"]] for g in optimizer.param_groups]
        self.norms.append([float(torch.cat(group).norm()) for group in groups])
        self.rates.append([group["lr"] for group in optimizer.param_groups])


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_logged_metrics_are_those_of_the_iteration(
    algorithm, chunk, build_algorithm, checkpoint, letter_env, fit, monkeypatch
):
    critic = None if algorithm is GRPO else HeadCritic
    module = build_algorithm(
        algorithm,
        lambda: LanguageModelPolicy(str(checkpoint("llama")), CompletionTemplate(), min_p=0.01),
        critic,
        logits_chunk_size=chunk,
        max_kl=None,
        policy_lr=0.05,
    )
    module.policy.stop_ids = list(range(3, 60))  # actions differ in length
    seen, entropies, gradients = [], [], Gradients()
    logged = module.log_clip_fraction

    def record(clipped, mask):
        seen.append((float((clipped.bool() & mask).sum()), int(mask.sum())))
        logged(clipped, mask)

    monkeypatch.setattr(module, "log_clip_fraction", record)

    def annotated(rollout, batch):
        actions = rollout.actions
        log_pi = module.policy(*actions[:3]).log_probs[actions.action_mask].detach()
        p = log_pi.exp()
        entropies.append(float(-(p * log_pi.nan_to_num(neginf=0.0)).sum(-1).mean()))

    def watch(trainer, pl_module):
        trainer.datamodule.on_targets_computed = annotated

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
    assert len({count for _, count in seen}) > 1 or algorithm is PPOKL

    assert len(gradients.norms) == 6  # optimizer steps
    names = ["policy", "critic"][: 1 if critic is None else 2]
    means = torch.tensor(gradients.norms).mean(0).tolist()
    if algorithm is JointClipETPO:
        names, means = ["all"], [float(torch.tensor(gradients.norms).norm(dim=1).mean())]
    norms = {f"train/grad_norm/{name}": mean for name, mean in zip(names, means, strict=True)}
    assert {n: v for n, v in metrics.items() if "grad_norm" in n} == pytest.approx(norms, rel=1e-4)
    assert metrics["train/lr/policy"] == pytest.approx(0.05)
    assert ("train/lr/critic" in metrics) == (critic is not None)
