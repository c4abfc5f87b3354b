"""Every baseline's credit by hand, and each of them through the real loop.

Two environments, two rounds, beta 0.5, gamma 0.8, lambda 0.5. d = log pi - log pi_ref:

row env t  tokens  reward  ends         d          values
0   0   0  2       -1.0    no           0.1, 0.2   0.1, 0.2
1   1   0  1        0.8    terminated   0.3        0.4
2   0   1  1        0.5    terminated  -0.1        0.6
3   1   0  2       -1.0    truncated    0.2, 0.4   0.5, 0.7     next prompt: 0.3
"""

import pytest
import torch
from lightning import Callback

from etpo.algorithms import archer, ppo
from etpo.algorithms.evaluation import TokenEvaluation
from etpo.algorithms.policy_gradient import standardized
from etpo.errors import ConfigError
from etpo.models.critics import HeadCritic
from etpo.rollout.types import Record, Rollout, TokenBatch

from .. import by_token
from ..by_token import actions_of, decisions_of, gather_tokens, states_of

MASK = torch.tensor([[1, 1], [1, 0], [1, 0], [1, 1]]).bool()
PROMPTS = torch.tensor([[5, 6], [5, 6], [5, 7], [5, 6]])
ACTIONS = actions_of(
    PROMPTS,
    torch.ones_like(PROMPTS).bool(),
    torch.full((4, 2), 9),
    MASK,
    hidden_states=torch.zeros(4, 2, 32),
    rewards=torch.tensor([-1.0, 0.8, 0.5, -1.0]),
    terminated=torch.tensor([False, True, True, False]),
    truncated=torch.tensor([False, False, False, True]),
    step=torch.tensor([0, 0, 1, 0]),
)
TREE = ACTIONS.tree()
# log-probabilities are 0 on padding; values there must not matter
LOG_PI = torch.tensor([[-1.0, -1.0], [-1.0, 0.0], [-1.0, 0.0], [-1.0, -1.0]])
EVALUATION = TokenEvaluation(
    tree=TREE,
    states=states_of(torch.zeros(len(TREE.node), 32)),
    log_pi=LOG_PI,
    log_ref=LOG_PI - torch.tensor([[0.1, 0.2], [0.3, 0.0], [-0.1, 0.0], [0.2, 0.4]]),
    kl=torch.zeros(4, 2),
    entropy=torch.zeros(4, 2),
    value=torch.tensor([[0.1, 0.2], [0.4, 9.0], [0.6, 9.0], [0.5, 0.7]]),
)
RECORDS = [Record(0, 1, "", "", 0.0, None, False)]
ROLLOUT = Rollout(ACTIONS, None, RECORDS, 2, 0, 1.0, 1.0)


@pytest.fixture
def credit(build_baseline, monkeypatch):
    """credit(name): advantages before they are standardized, and the critic's targets."""

    def run(name):
        module = build_baseline(name)
        bootstrap = torch.tensor([0.0, 0.0, 0.0, 0.3])
        monkeypatch.setattr(module, "start_iteration", lambda rollout: (ACTIONS, EVALUATION))
        monkeypatch.setattr(module, "bootstrap_values", lambda rollout: bootstrap)
        monkeypatch.setattr(module, "all_gather", lambda value: value)
        for source in (ppo, archer):
            monkeypatch.setattr(source, "standardized", lambda module, values, mask: values)
        batch = module.compute_targets(ROLLOUT)
        return [
            [[float(x) for x in row[valid]] for row, valid in zip(field, MASK, strict=True)]
            for field in (batch.advantages, batch.returns)
        ]

    return run


def near(rows):
    return [pytest.approx(row, abs=1e-6) for row in rows]


def log_probs_taken(module, batch, **side):
    return gather_tokens(by_token.log_probs(module.policy, *batch[:3], **side), batch.action_ids)


def test_poad(credit):
    # environment 0: R = -0.05, -1.1, 0.55; g = 1, 0.8, 0
    # d = -0.05 + 0.2 - 0.1, -1.1 + 0.8 x 0.6 - 0.2, 0.55 - 0.6 = 0.05, -0.82, -0.05
    # A = 0.05 + 0.5 x -0.84, -0.82 + 0.8 x 0.5 x -0.05, -0.05
    # environment 1: 0.65 - 0.4; then d = -0.1 + 0.7 - 0.5, -1.2 + 0.8 x 0.3 - 0.7 = 0.1, -1.66
    advantages, returns = credit("poad")
    assert advantages == near([[-0.37, -0.84], [0.25], [-0.05], [-0.73, -1.66]])
    assert returns == near([[-0.27, -0.64], [0.65], [0.55], [-0.23, -0.96]])


def test_ntpo(credit):
    # as POAD, but the first tokens: d = -0.05 + 0.8 x 0.2 - 0.1 = 0.01, A = 0.01 + 0.4 x -0.84;
    # d = -0.1 + 0.8 x 0.7 - 0.5 = -0.04, A = -0.04 + 0.4 x -1.66
    advantages, _ = credit("ntpo")
    assert advantages == near([[-0.326, -0.84], [0.25], [-0.05], [-0.704, -1.66]])


def test_ppo_kl(credit):
    # R = -1 - 0.5 x 0.3, 0.8 - 0.15, 0.5 + 0.05, -1 - 0.5 x 0.6 = -1.15, 0.65, 0.55, -1.3
    # environment 0: d = -1.15 + 0.8 x 0.6 - 0.1, 0.55 - 0.6 = -0.77, -0.05; A = -0.77 + 0.4 x -0.05
    # environment 1: 0.65 - 0.4; -1.3 + 0.8 x 0.3 - 0.5
    advantages, returns = credit("ppo_kl")
    assert advantages == near([[-0.79] * 2, [0.25], [-0.05], [-1.56] * 2])
    assert returns == near([[-0.69] * 2, [0.65], [0.55], [-1.06] * 2])


def test_archer_targets(credit):
    # r - beta KL + gamma V(o'): -1.15 + 0.8 x 0.6, 0.65, 0.55, -1.3 + 0.8 x 0.3
    _, returns = credit("archer")
    assert returns == near([[-0.67] * 2, [0.65], [0.55], [-1.06] * 2])


class LastToken(torch.nn.Module):
    """V of a prefix is a tenth of its last token, A of a token w after it is w^2 / 100."""

    def hidden_states(self, tree, ref_hidden, old_hidden):
        return tree.nodes.token[tree.node, None].float()

    def head(self, hidden, ids=None):
        return hidden[..., 0] / 10, (torch.arange(200) ** 2 / 100).expand(*hidden.shape[:-1], -1)


def test_archer_credits_q_less_v(build_baseline, monkeypatch):
    """A(o, a) = Q(o, a) - V(o), arXiv 2402.19446, of the target critic; then standardised."""
    module = build_baseline("archer")
    module.target_critic = LastToken()
    monkeypatch.setattr(module, "all_gather", lambda value: value)
    actions = ACTIONS._replace(action_ids=torch.tensor([[3, 8], [5, 9], [9, 3], [4, 2]]))
    hidden = by_token.hidden_states(module.policy, *actions[:3]).detach()
    batch = module.compute_targets(
        ROLLOUT._replace(
            actions=actions._replace(hidden_states=hidden),
            bootstrap=decisions_of(torch.tensor([[8]]), torch.tensor([[True]])),
        )
    )
    v = torch.tensor([0.6, 0.6, 0.7, 0.6])
    q = torch.tensor([0.3 + 0.64, 0.6 + 0.25, 0.7 + 0.81, 0.4 + 0.04])
    advantages = (q - v - (q - v).mean()) / ((q - v).std(correction=0) + 1e-4)
    torch.testing.assert_close(batch.advantages, advantages[:, None].expand(4, 2))
    torch.testing.assert_close(batch.action_values, q)
    # r + gamma V(o') at pi = pi_ref
    returns = torch.tensor([-1 + 0.8 * 0.7, 0.8, 0.5, -1 + 0.8 * 0.8])
    torch.testing.assert_close(batch.returns, returns[:, None].expand(4, 2))


def test_reinforce(credit):
    # returns -1.15 + 0.8 x 0.55, 0.65, 0.55, -1.3; mean -0.2025
    advantages, _ = credit("reinforce")
    assert advantages == near([[-0.5075] * 2, [0.8525], [0.7525], [-1.0975] * 2])


def test_rloo(credit):
    # rows 0, 1 and 3 share a prompt; row 3 follows row 1, and row 2 is alone on prompt and turn;
    # the others' means are -0.325, -0.71, -0.325 (rows 1 and 3) and -0.03
    advantages, _ = credit("rloo")
    assert advantages == near([[-0.385] * 2, [1.36], [0.875], [-1.27] * 2])


def test_grpo(credit):
    # no KL in the reward: -1 + 0.8 x 0.5, 0.8, 0.5, -1; of rows 0, 1, 3 the mean is -4/15, the
    # deviation sqrt((0.1111 + 1.1378 + 0.5378) / 2) = 0.945163; row 2 is alone
    advantages, _ = credit("grpo")
    deviation = 0.945163 + 1e-4
    assert advantages == near(
        [[-1 / 3 / deviation] * 2, [16 / 15 / deviation], [0.0], [-11 / 15 / deviation] * 2]
    )


def test_truncated_actions_are_bootstrapped_at_their_next_prompts(build_baseline):
    """Rows 1 and 2, by environment the other way round."""
    module = build_baseline("poad")
    random = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(module.critic.head.value.weight, generator=random)
    cut = torch.tensor([False, True, True, False])
    values = module.bootstrap_values(
        ROLLOUT._replace(
            actions=ACTIONS._replace(terminated=~cut, truncated=cut),
            bootstrap=decisions_of(
                torch.tensor([[5, 6, 7], [0, 0, 8]]), torch.tensor([[1, 1, 1], [0, 0, 1]]).bool()
            ),
        ),
    )

    def plain(prompt):
        ids = torch.tensor([prompt])
        inputs = ids, torch.ones_like(ids).bool(), torch.tensor([[9]])
        return by_token.critic_outputs(module.critic, module.policy, *inputs).item()

    assert abs(plain([5, 6, 7]) - plain([8])) > 0.1
    assert values.tolist() == pytest.approx([0, plain([5, 6, 7]), plain([8]), 0], abs=1e-5)


def test_a_bootstrap_value_does_not_depend_on_its_placeholder(build_algorithm, make_policy):
    """`min_p` may cut the placeholder off."""
    module = build_algorithm(
        "etpo", make_policy(min_p=0.3), HeadCritic, 32, pessimism_threshold=1.0
    )
    with torch.no_grad():
        module.policy.lm_head.weight.mul_(3)  # some tokens are cut off
        for parameter in module.target_critic.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    cut = torch.tensor([False, False, False, True])
    decisions = decisions_of(torch.tensor([[5, 6, 7]]), torch.ones(1, 3).bool())
    rollout = ROLLOUT._replace(actions=ACTIONS._replace(terminated=~cut, truncated=cut))
    values = [
        module.bootstrap_values(
            rollout._replace(
                bootstrap=decisions._replace(action_ids=torch.full_like(decisions.action_ids, w))
            )
        )[3].item()
        for w in range(0, 40, 4)
    ]
    assert values == pytest.approx([values[0]] * len(values), abs=1e-6)


def test_standardized_advantages_do_not_count_padding(build_baseline, monkeypatch):
    module = build_baseline("poad")
    monkeypatch.setattr(module, "all_gather", lambda value: value)
    values = 3 + 5 * torch.randn(MASK.shape, generator=torch.Generator().manual_seed(0))
    advantages = standardized(module, values.where(MASK, 1e3), MASK)[MASK]
    assert advantages.mean().item() == pytest.approx(0, abs=1e-5)
    assert advantages.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert torch.equal(advantages.argsort(), values[MASK].argsort())
    assert standardized(module, torch.full(MASK.shape, -0.9), MASK).abs().max() < 0.01


ALL = ["poad", "ntpo", "ppo_kl", "archer", "reinforce", "rloo", "grpo", "gigpo"]


@pytest.fixture
def train(fit, monkeypatch):
    """train(module, env, iterations): the last rollout and training batch; 10 updates each."""

    def run(module, env, iterations):
        compute_targets, batches = module.compute_targets, []

        def kept(rollout):
            batches.append(compute_targets(rollout))
            return batches[-1]

        monkeypatch.setattr(module, "compute_targets", kept)
        data = fit(module, env, iterations, minibatch_size=64, update_epochs=10)
        return data.rollout, batches[-1]

    return run


@pytest.fixture
def odd_letters(letter_env, paid):
    """Pays actions whose last letter has an odd code."""
    return paid(letter_env(8, length=1), lambda action: sum(map(ord, action[-1:])) % 2)


@pytest.mark.parametrize("algorithm", ALL)
def test_nothing_moves_without_reward(algorithm, build_baseline, letter_env, fit, paid):
    module = build_baseline(algorithm, beta=0.0)
    before = [p.clone() for p in module.policy.trainable_parameters()]
    fit(module, paid(letter_env(4), lambda action: 0), 1)
    for old, new in zip(before, module.policy.trainable_parameters(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("min_p", [0.0, 0.05])
@pytest.mark.parametrize("algorithm", ALL)
def test_credited_tokens_become_likelier(algorithm, min_p, build_baseline, odd_letters, train):
    """In the fourth iteration: ArCHer's critic must be trained first."""
    module = build_baseline(algorithm, min_p=min_p)
    rollout, batch = train(module, odd_letters, 4)
    assert 0 < rollout.actions.rewards.mean() < 1
    with torch.no_grad():
        taken = log_probs_taken(module, batch)
    gain = (taken - batch.old_log_probs)[batch.step_mask]
    credited = batch.advantages[batch.step_mask]
    assert gain[credited > 0].mean() > gain[credited < 0].mean() + 0.01


@pytest.mark.parametrize("algorithm", ALL)
def test_paid_actions_become_likelier(algorithm, build_baseline, odd_letters, train):
    """In the first iteration: later the KL weighs too. ArCHer's critic needs two to learn."""
    slow = algorithm == "archer"
    module = build_baseline(algorithm, **({"beta": 0.0, "critic_lr": 3e-2} if slow else {}))
    rollout, batch = train(module, odd_letters, 3 if slow else 1)
    rewards = rollout.actions.rewards
    with torch.no_grad():
        taken = log_probs_taken(module, batch)
    gain = ((taken - batch.old_log_probs) * batch.step_mask).sum(1)
    assert gain[rewards == 1].mean() > gain[rewards == 0].mean() + 0.5


@pytest.mark.parametrize("algorithm", ["rloo", "poad"])
def test_the_trust_region_stops_the_policy(algorithm, build_baseline, letter_env, fit, paid):
    class Watch(Callback):
        def __init__(self):
            self.moved = []

        def on_train_batch_start(self, trainer, module, batch, index):
            self.before = [p.detach().clone() for p in module.policy.trainable_parameters()]

        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            pairs = zip(self.before, module.policy.trainable_parameters(), strict=True)
            moved = not all(torch.equal(old, new) for old, new in pairs)
            self.moved.append((module.kl_stopped, moved))

    watch = Watch()
    fit(
        build_baseline(algorithm, max_kl=1e-4),
        paid(letter_env(8), len),
        2,
        [watch],
        update_epochs=4,
    )
    assert {stopped for stopped, _ in watch.moved} == {True, False}
    assert all(moved != stopped for stopped, moved in watch.moved)
    assert watch.moved[-1] == (True, False)


@pytest.mark.parametrize("algorithm", ALL)
def test_the_step_is_the_policy_gradient(
    algorithm, build_baseline, letter_env, fit, paid, assert_same_gradient
):
    """At pi = pi_old = pi_ref: -A grad log pi, summed over tokens; the mean for GRPO."""
    module = build_baseline(algorithm)
    data = fit(module, paid(letter_env(4), len), 1, update_epochs=1, minibatch_size=32)
    fresh = build_baseline(algorithm)
    fresh.trainer = module.trainer
    batch = fresh.compute_targets(data.rollout)
    lengths = torch.arange(len(batch.weights)) % 5 + 1
    mask = batch.step_mask & (torch.arange(batch.step_mask.shape[1]) < lengths[:, None])
    old_log_probs = log_probs_taken(fresh, batch).detach() * mask
    advantages = torch.randn(mask.shape)
    batch = batch._replace(step_mask=mask, old_log_probs=old_log_probs, advantages=advantages)
    batch = batch.select(torch.arange(len(mask)))  # with the tree of the shorter actions
    if algorithm == "ppo_kl":  # one advantage per action
        batch = batch._replace(advantages=batch.advantages[:, :1].expand_as(mask))
    loss, metrics = fresh.policy_loss(batch)
    assert metrics["train/kl_to_old"][0].item() == pytest.approx(0, abs=1e-6)
    expected = -(batch.advantages * log_probs_taken(fresh, batch) * mask).sum(1)
    if algorithm == "grpo":
        expected = expected / mask.sum(1)
    assert_same_gradient(loss, expected.mean(), fresh.policy.trainable_parameters(), 1e-4, 1e-5)


def test_the_step_of_grpo_away_from_the_reference(build_baseline, assert_same_gradient):
    """Mean over tokens of -A log pi + beta k3, whose gradient is 0 at pi = pi_ref."""
    module = build_baseline("grpo", beta=0.3)
    parameters = module.policy.trainable_parameters()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.05 * torch.randn(parameter.shape, generator=random)
    actions = ACTIONS._replace(action_ids=torch.randint(3, 200, MASK.shape, generator=random))
    log_pi = log_probs_taken(module, actions)
    log_ref = log_probs_taken(module, actions, reference=True)
    advantages = torch.randn(MASK.shape, generator=random)
    tree = actions.tree()
    loss, _ = module.policy_loss(
        TokenBatch(
            *actions[:3],
            actions.step_mask,
            tree=tree,
            states=states_of(torch.zeros(len(tree.node), 0)),
            old_log_probs=log_pi.detach(),
            ref_log_probs=log_ref,
            advantages=advantages,
            returns=torch.zeros(MASK.shape),
            weights=torch.ones(4),
            sample_weights=torch.ones(MASK.shape),
        )
    )
    difference = log_ref - log_pi
    tokens = -advantages * log_pi + 0.3 * (difference.exp() - difference - 1)
    expected = (tokens * MASK).sum(1) / MASK.sum(1)
    assert_same_gradient(loss, expected.mean(), parameters, 1e-4, 1e-5)


@pytest.mark.parametrize("setting", [{"clip_unit": "probability"}, {"lambda_length_alpha": 0.5}])
def test_whole_actions_refuse_what_is_of_tokens(setting):
    (key,) = setting
    with pytest.raises(ConfigError, match=rf"algorithm.{key}=.*: allowed with algorithm.unit"):
        ppo.PPOSettings(unit="action", **setting)
    assert ppo.PPOSettings(unit="token", **setting)
