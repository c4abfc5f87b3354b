"""Every baseline's credit by hand, and each of them through the real loop.

Two environments, two rounds, beta 0.5, gamma 0.8, lambda 0.5. d = log pi - log pi_ref:

row env t  tokens  reward  ends         d          values
0   0   0  2       -1.0    no           0.1, 0.2   0.1, 0.2
1   1   0  1        0.8    terminated   0.3        0.4
2   0   1  1        0.5    terminated  -0.1        0.6
3   1   0  2       -1.0    truncated    0.2, 0.4   0.5, 0.7     next prompt: 0.3
"""

import functools

import pytest
import torch

from etpo.algorithms.advantages import (
    generalized_advantages,
    group_mean_of_others,
    group_standardised,
    groups_of_prompts,
    k3,
    penalised_rewards,
)
from etpo.algorithms.archer import ArCHer
from etpo.algorithms.ntpo import NTPO
from etpo.algorithms.poad import POAD
from etpo.algorithms.policy_gradient import Taken
from etpo.algorithms.ppo_kl import PPOKL
from etpo.algorithms.reinforce import GRPO, RLOO, Reinforce
from etpo.models.backbone import Backbone
from etpo.models.critics import HeadCritic
from etpo.models.prompting import CompletionTemplate
from etpo.rollout.episode import Actions, Rollout

MASK = torch.tensor([[1, 1], [1, 0], [1, 0], [1, 1]]).bool()
PROMPTS = torch.tensor([[5, 6], [5, 6], [5, 7], [5, 6]])
ACTIONS = Actions(
    prompt_ids=PROMPTS,
    prompt_mask=torch.ones_like(PROMPTS).bool(),
    action_ids=torch.full((4, 2), 9),
    action_mask=MASK,
    log_probs=torch.zeros(4, 2),
    rewards=torch.tensor([-1.0, 0.8, 0.5, -1.0]),
    terminated=torch.tensor([False, True, True, False]),
    truncated=torch.tensor([False, False, False, True]),
    step=torch.tensor([0, 0, 1, 0]),
)
# what lies beyond an action's end must not matter
LOG_PI = torch.tensor([[-1.0, -1.0], [-1.0, 7.0], [-1.0, 7.0], [-1.0, -1.0]])
TAKEN = Taken(
    log_pi=LOG_PI,
    log_ref=LOG_PI - torch.tensor([[0.1, 0.2], [0.3, 9.0], [-0.1, 9.0], [0.2, 0.4]]),
    values=torch.tensor([[0.1, 0.2], [0.4, 9.0], [0.6, 9.0], [0.5, 0.7]]),
    features=torch.zeros(4, 2, 1),
)
ROLLOUT = Rollout(ACTIONS, torch.zeros(1, 1), torch.ones(1, 1), [], 2, 0, 1.0, 1.0)
WITH_CRITIC = {POAD: {"lambda_": 0.5}, NTPO: {"lambda_": 0.5}, PPOKL: {"lambda_": 0.5}}
SETTINGS = {
    "beta": 0.5,
    "gamma": 0.8,
    "clip": 0.2,
    "max_kl": None,
    "policy_lr": 3e-3,
    "critic_lr": 3e-3,
    "max_grad_norm": 1.0,
    "annotation_batch": 8,
}


@pytest.fixture
def build(checkpoint, monkeypatch):
    def make(algorithm, **changes):
        own = WITH_CRITIC.get(algorithm, {"tau": 1.0} if algorithm is ArCHer else {})
        has_critic = algorithm in WITH_CRITIC or algorithm is ArCHer
        return algorithm(
            lambda: Backbone(str(checkpoint("llama")), CompletionTemplate()),
            functools.partial(HeadCritic, hidden_size=16) if has_critic else None,
            functools.partial(torch.optim.AdamW, eps=1e-5, weight_decay=0.0),
            **(SETTINGS | own | changes),
        )

    return make


@pytest.fixture
def credit(build, monkeypatch):
    """credit(algorithm): advantages before they are standardised, and the critic's targets."""

    def run(algorithm):
        module = build(algorithm)
        bootstrap = torch.tensor([0.0, 0.0, 0.0, 0.3])
        monkeypatch.setattr(module, "bootstrap_values", lambda *_: bootstrap)
        monkeypatch.setattr(module, "standardised", lambda values, mask: values)
        monkeypatch.setattr(module, "all_gather", lambda value: value)
        advantages, returns = module.credit(ACTIONS, TAKEN, ROLLOUT)
        return [
            [[float(x) for x in row[valid]] for row, valid in zip(field, MASK, strict=True)]
            for field in (advantages, returns)
        ]

    return run


def near(rows):
    return [pytest.approx(row, abs=1e-6) for row in rows]


def test_poad(credit):
    # environment 0: R = -0.05, -1.1, 0.55; g = 1, 0.8, 0
    # d = -0.05 + 0.2 - 0.1, -1.1 + 0.8 x 0.6 - 0.2, 0.55 - 0.6 = 0.05, -0.82, -0.05
    # A = 0.05 + 0.5 x -0.84, -0.82 + 0.8 x 0.5 x -0.05, -0.05
    # environment 1: 0.65 - 0.4; then d = -0.1 + 0.7 - 0.5, -1.2 + 0.8 x 0.3 - 0.7 = 0.1, -1.66
    advantages, returns = credit(POAD)
    assert advantages == near([[-0.37, -0.84], [0.25], [-0.05], [-0.73, -1.66]])
    assert returns == near([[-0.27, -0.64], [0.65], [0.55], [-0.23, -0.96]])


def test_ntpo(credit):
    # as POAD, but the first tokens: d = -0.05 + 0.8 x 0.2 - 0.1 = 0.01, A = 0.01 + 0.4 x -0.84;
    # d = -0.1 + 0.8 x 0.7 - 0.5 = -0.04, A = -0.04 + 0.4 x -1.66
    advantages, _ = credit(NTPO)
    assert advantages == near([[-0.326, -0.84], [0.25], [-0.05], [-0.704, -1.66]])


def test_ppo_kl(credit):
    # R = -1 - 0.5 x 0.3, 0.8 - 0.15, 0.5 + 0.05, -1 - 0.5 x 0.6 = -1.15, 0.65, 0.55, -1.3
    # environment 0: d = -1.15 + 0.8 x 0.6 - 0.1, 0.55 - 0.6 = -0.77, -0.05; A = -0.77 + 0.4 x -0.05
    # environment 1: 0.65 - 0.4; -1.3 + 0.8 x 0.3 - 0.5
    advantages, returns = credit(PPOKL)
    assert advantages == near([[-0.79] * 2, [0.25], [-0.05], [-1.56] * 2])
    assert returns == near([[-0.69] * 2, [0.65], [0.55], [-1.06] * 2])


def test_archer_targets(credit):
    # r - beta KL + gamma V(o'): -1.15 + 0.8 x 0.6, 0.65, 0.55, -1.3 + 0.8 x 0.3
    _, returns = credit(ArCHer)
    assert returns == near([[-0.67] * 2, [0.65], [0.55], [-1.06] * 2])


def test_reinforce(credit):
    # returns -1.15 + 0.8 x 0.55, 0.65, 0.55, -1.3; mean -0.2025
    advantages, _ = credit(Reinforce)
    assert advantages == near([[-0.5075] * 2, [0.8525], [0.7525], [-1.0975] * 2])


def test_rloo(credit):
    # rows 0, 1 and 3 share a prompt; the others' means are -0.325, -1.005, -0.03
    advantages, _ = credit(RLOO)
    assert advantages == near([[-0.385] * 2, [1.655], [0.55], [-1.27] * 2])


def test_grpo(credit):
    # no KL in the reward: -1 + 0.8 x 0.5, 0.8, 0.5, -1; of rows 0, 1, 3 the mean is -4/15, the
    # deviation sqrt((0.1111 + 1.1378 + 0.5378) / 2) = 0.945163; row 2 is alone
    advantages, _ = credit(GRPO)
    deviation = 0.945163 + 1e-4
    assert advantages == near(
        [[-1 / 3 / deviation] * 2, [16 / 15 / deviation], [0.0], [-11 / 15 / deviation] * 2]
    )
