"""Baselines of groups over several turns: by hand, and unbiased by enumeration.

Two environments, four rounds, gamma 0.5, no KL in the reward:

row env t  prompt  reward  ends        return
0   0   0  5       1       no          2
1   1   0  5       0       no          1
2   0   1  6       0       no          2
3   1   1  6       2       terminated  2
4   0   2  6       4       terminated  4
5   1   0  7       1       no          3.5
6   0   0  5       3       truncated   3
7   1   1  8       5       truncated   5
"""

import itertools

import pytest
import torch

from etpo.algorithms.baselines import (
    Groups,
    action_groups,
    group_standardized,
    mean_of_other_episodes,
    unique_as_one_group,
)
from etpo.algorithms.evaluation import TokenEvaluation
from etpo.rollout.types import Record, Rollout

from ..by_token import actions_of, states_of
from .enumerated_gradient import EXACT, SEEDS, WRONG, EnumeratedGradient

ONES = torch.ones(8, 1, dtype=torch.bool)
ACTIONS = actions_of(
    torch.tensor([5, 5, 6, 6, 6, 7, 5, 8])[:, None],
    ONES,
    torch.full((8, 1), 9),
    ONES,
    hidden_states=torch.zeros(8, 1, 32),
    rewards=torch.tensor([1.0, 0.0, 0.0, 2.0, 4.0, 1.0, 3.0, 5.0]),
    terminated=torch.tensor([0, 0, 0, 1, 1, 0, 0, 0]).bool(),
    truncated=torch.tensor([0, 0, 0, 0, 0, 0, 1, 1]).bool(),
    step=torch.tensor([0, 0, 1, 1, 2, 0, 0, 1]),
)
# the episode of row 6 follows that of rows 0, 2 and 4: it is in none of their means
RLOO = [1.0, -1.5, 0.0, -1.0, 2.0, 1.5, 1.5, 3.0]
# episodes on prompt 5 have returns 2, 1 and 3; the one that begins with prompt 7 is compared to all
EPISODES = [1.0, -1.5, 1.0, -1.5, 1.0, 1.5, 1.5, 1.5]
ROOT = (4 / 3) ** 0.5  # deviation of 2, 2, 4 on prompt 6; that of 2, 1, 3 is 1
STANDARDIZED = [0, -1, -2 / 3 / ROOT, -2 / 3 / ROOT, 4 / 3 / ROOT, 0, 1, 0]
STANDARDIZED_EPISODES = [0, -1, 0, -1, 0, 0, 1, 0]


@pytest.fixture
def credit(build_baseline, monkeypatch):
    """credit(name, actions, fresh, ...): advantages [B] of the first `fresh` and replayed rows."""

    def run(name, actions=ACTIONS, fresh=8, **changes):
        module = build_baseline(name, gamma=0.5, beta=0.0, **changes)
        tree, zeros = actions.tree(), torch.zeros(len(actions.rewards), 1)
        states = states_of(torch.zeros(len(tree.node), 32))
        old = TokenEvaluation(tree, states, *[zeros] * 5)
        replayed = zeros[fresh:] if fresh < len(zeros) else None
        records = [Record(0, 1, "", "", 0.0, None, False)]
        rollout = Rollout(actions, None, records, 2, 0, 1.0, 1.0, replayed)
        monkeypatch.setattr(module, "start_iteration", lambda rollout: (actions, old))
        monkeypatch.setattr(module, "all_gather", lambda value: value)
        return module.compute_targets(rollout).advantages[:, 0]

    return run


def test_the_baseline_of_rloo_is_of_other_episodes(credit):
    """Rows 2 and 4 are one episode; rows 5 and 7 have other episodes' returns of their turn."""
    assert credit("rloo").tolist() == pytest.approx(RLOO)


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.0])
def test_gigpo_compares_episodes_and_steps(credit, weight):
    expected = torch.tensor(EPISODES) + weight * torch.tensor(RLOO)
    torch.testing.assert_close(credit("gigpo", step_weight=weight), expected)


def test_gigpo_as_published(credit):
    """Means and deviations with one's own return; 0 in a group of one."""
    expected = torch.tensor(STANDARDIZED_EPISODES) + 2 * torch.tensor(STANDARDIZED)
    actual = credit("gigpo", baseline="group", step_weight=2.0)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("baseline", ["leave_one_out", "group"])
def test_groups_do_not_mix_iterations(credit, baseline):
    """The replayed iteration has ten times the rewards of the fresh one."""
    both = type(ACTIONS)(*(torch.cat([x, x]) for x in ACTIONS))
    scale = torch.tensor([1.0, 10.0]).repeat_interleave(8)
    advantages = credit("gigpo", both._replace(rewards=both.rewards * scale), baseline=baseline)
    fresh = credit("gigpo", baseline=baseline)
    torch.testing.assert_close(advantages[:8], fresh)
    factor = 10.0 if baseline == "leave_one_out" else 1.0
    torch.testing.assert_close(advantages[8:], factor * fresh, rtol=1e-3, atol=1e-3)


def test_episodes_of_an_iteration():
    groups = action_groups(ACTIONS.prompt_ids, ACTIONS.prompt_mask, ACTIONS.step, num_envs=2)
    assert groups.episode.tolist() == [0, 1, 0, 1, 0, 5, 6, 5]
    assert groups.environment.tolist() == [0, 1] * 4
    one_turn = action_groups(
        ACTIONS.prompt_ids, ACTIONS.prompt_mask, torch.zeros_like(ACTIONS.step), num_envs=2
    )
    assert one_turn.episode.tolist() == list(range(8))
    assert one_turn.environment.tolist() == [0, 1] * 4


def test_mean_of_other_episodes_by_hand():
    """Rows 0 and 1 are an episode, row 4 is the next one of its environment."""
    returns, environment = torch.tensor([1.0, 2.0, 3.0, 8.0, 5.0]), torch.tensor([0, 0, 1, 2, 0])
    prompt, everyone = torch.tensor([0, 1, 0, 2, 0]), torch.zeros(5, dtype=torch.long)
    groups = Groups(prompt, torch.tensor([0, 0, 2, 3, 4]), environment, everyone)
    assert mean_of_other_episodes(returns, groups, prompt).tolist() == [3, 0, 3, 0, 2]
    actual = mean_of_other_episodes(returns, groups, prompt, everyone)
    assert actual.tolist() == [3, 5.5, 3, 2.75, 2]
    alone = groups.select(torch.arange(2))
    assert mean_of_other_episodes(returns[:2], alone, everyone[:2]).tolist() == [0, 0]


@pytest.mark.parametrize("prompts", [[0] * 6, [0, 1, 0, 1, 2, 2], [0, 1, 2, 3, 4, 5]])
def test_one_turn_baselines_are_means_over_the_other_answers(build_baseline, prompts):
    """Of the prompt, or of all if every prompt is unique."""
    values, group = torch.randn(6, dtype=torch.float64), torch.tensor(prompts)
    steps = torch.zeros_like(group)
    groups = action_groups(group[:, None], torch.ones(6, 1).bool(), steps, num_envs=6)
    actual = build_baseline("rloo").subtract_baseline(values, groups)
    group = unique_as_one_group(group)
    for row in range(6):
        others = (group == group[row]) & (torch.arange(6) != row)
        torch.testing.assert_close(actual[row], values[row] - values[others].mean())
    gigpo = build_baseline("gigpo").subtract_baseline(values, groups)
    torch.testing.assert_close(gigpo, 2 * actual)


def each_state(state):
    return state


def two_observations(state):
    """States 1 and 2 look alike: an episode can have one observation twice."""
    return state.clamp(max=1)


def credit_of_pairs(case, advantages, observation):
    """Return the expected advantage [E, K] of every action in a batch of two episodes."""
    e, lengths = case.e, case.e.valid.sum(1).tolist()
    credit = torch.zeros(len(lengths), *e.state.shape, dtype=torch.float64)
    for i, j in torch.combinations(torch.arange(len(lengths)), with_replacement=True).tolist():
        own, other = slice(lengths[i]), slice(lengths[j])
        values, prompt, step = (
            torch.cat([x[i, own], x[j, other]])
            for x in (case.returns, observation(e.state), e.step)
        )
        episode = torch.tensor([0] * lengths[i] + [lengths[i]] * lengths[j])
        both = advantages(values, Groups(prompt, episode, episode, step))
        credit[i, j, own], credit[j, i, other] = both[: lengths[i]], both[lengths[i] :]
    return case.expectation(credit)


@pytest.mark.parametrize("observation", [each_state, two_observations])
def test_rloo_keeps_the_gradient_of_several_turns(observation, build_baseline):
    module = build_baseline("rloo")
    for seed in SEEDS[:2]:
        case = EnumeratedGradient(seed)
        credit = credit_of_pairs(case, module.subtract_baseline, observation)
        assert (credit - case.returns)[case.e.valid].abs().max() > 1e-3
        assert case.error(case.credited(credit)) < EXACT


@pytest.mark.parametrize("observation", [each_state, two_observations])
def test_gigpo_keeps_the_gradient_of_several_turns(observation, build_baseline):
    """Both parts are the gradient; the return of the whole episode is discounted from its start."""
    module = build_baseline("gigpo", step_weight=0.5)
    case = EnumeratedGradient(0, gamma=1.0)
    gradient = case.credited(credit_of_pairs(case, module.subtract_baseline, observation))
    assert case.error(gradient / 1.5) < EXACT
    module = build_baseline("gigpo", step_weight=0.0)
    case = EnumeratedGradient(1, gamma=0.9)
    credit = credit_of_pairs(case, module.subtract_baseline, observation)
    assert case.error(case.credited(credit, case.e.valid.double())) < EXACT


def unique_prompts_in_one_group(values, groups):
    """Subtract the mean of all other actions of a group, of one's own episode too."""
    rows = torch.arange(len(values))
    each = groups._replace(episode=rows, environment=rows)
    return values - mean_of_other_episodes(values, each, unique_as_one_group(groups.prompt))


def no_credit_without_another_episode(values, groups):
    same = groups.prompt[:, None] == groups.prompt[None, :]
    other = groups.episode[:, None] != groups.episode[None, :]
    advantages = values - mean_of_other_episodes(values, groups, groups.prompt)
    return advantages * (same & other).any(1)


def standardized(values, groups):
    return group_standardized(values, groups.prompt)


@pytest.mark.parametrize(
    "wrong",
    [unique_prompts_in_one_group, no_credit_without_another_episode, standardized],
)
def test_a_group_that_changes_the_gradient_is_caught(wrong):
    for seed in SEEDS[:2]:
        case = EnumeratedGradient(seed)
        gradient = case.credited(credit_of_pairs(case, wrong, each_state))
        assert case.misdirection(gradient) > WRONG


def enumerate_rounds(mdp, rounds, state=None, step=0):
    """Yield (probability, [(state, action, step, reward, continues)]) of one environment."""
    if rounds == 0:
        yield 1.0, []
        return
    if state is None:
        for first, chance in enumerate(mdp.start.tolist()):
            for probability, rows in enumerate_rounds(mdp, rounds, first):
                yield chance * probability, rows
        return
    for action in range(mdp.rewards.shape[1]):
        stop, reward = mdp.termination[state, action].item(), mdp.rewards[state, action].item()
        following = [(stop, None)] if stop else []
        if stop < 1:
            moves = enumerate(mdp.transitions[state, action].tolist())
            following += [((1 - stop) * chance, after) for after, chance in moves if chance]
        for chance, after in following:
            goes_on = after is not None
            row = state, action, step, reward, goes_on and rounds > 1
            for probability, rows in enumerate_rounds(
                mdp, rounds - 1, after, step + 1 if goes_on else 0
            ):
                yield chance * probability, [row, *rows]


def baseline_gradient(case, advantages, groups_of):
    """Return the expected gradient that the baseline adds in two environments of two rounds."""
    log_pi, total = case.log_pi[:, 0], 0.0
    rollouts = list(enumerate_rounds(case.mdp, 2))
    for (p, rows), (q, others) in itertools.product(rollouts, repeat=2):
        both = [row for pair in zip(rows, others, strict=True) for row in pair]
        state, action, step, *_ = (torch.tensor(x) for x in zip(*both, strict=True))
        values = torch.tensor([row[3] for row in both], dtype=torch.float64)
        goes_on = torch.tensor([row[4] for row in both])[:2]
        values[:2] += case.mdp.gamma * values[2:] * goes_on
        groups = groups_of(state[:, None], torch.ones(4, 1).bool(), step, 2)
        taken = log_pi[state, action]
        baseline = values - advantages(values, groups)
        total = total + p * q * taken.detach().sum().exp() * (baseline * taken).sum()
    return case.gradient(total)


def test_later_episodes_of_an_environment_would_change_the_gradient(build_baseline):
    """They begin when the episode ends, and end with the last round."""
    case, module = EnumeratedGradient(0), build_baseline("rloo")

    actual = baseline_gradient(case, module.subtract_baseline, action_groups)
    assert actual.abs().max() < EXACT

    def own_episode_alone(*columns):
        groups = action_groups(*columns)
        return groups._replace(environment=groups.episode)

    wrong = baseline_gradient(case, module.subtract_baseline, own_episode_alone)
    assert wrong.norm() > WRONG * case.exact.norm()
