"""The exact optimum of the credit suite against the enumeration of a token MDP and by play."""

from dataclasses import replace
from itertools import product
from math import exp, log

import numpy as np
import pytest
import torch

from etpo import train
from etpo.errors import ConfigError
from etpo_tasks.credit_optimum import OptimumFraction, solve, solved_iteration
from etpo_tasks.credit_suite import CreditSuiteEnv, Dials

from ..token_mdp_oracle import TokenMDP

BETA, GAMMA = 0.15, 0.8


def enumerated(dials):
    """The MDP that the environment's own steps span, as tables.

    A state is (turn, may earn, unpaid, cue); an action is a text of l letters.
    """
    texts = ["".join(t) for t in product("abcdefgh"[: dials.letters], repeat=dials.length)]
    environment = CreditSuiteEnv(num_envs=len(texts), **vars(dials))
    environment.reset(seed=0)
    states = [(0, True, 0, cue) for cue in range(dials.cues)]
    rewards, following = [], []
    for turn, is_open, unpaid, cue in states:  # grows in the loop
        environment.turn[:], environment.open[:] = turn, is_open
        environment.unpaid[:], environment.cue[:] = unpaid, cue
        _, earned, ended, *_ = environment.step(texts)
        rewards.append(earned)
        columns = environment.turn, environment.open, environment.unpaid, environment.cue
        after = zip(*(column.tolist() for column in columns), strict=True)
        following.append([None if end else s for end, s in zip(ended, after, strict=True)])
        states += [s for s in dict.fromkeys(following[-1]) if s is not None and s not in states]
    transitions = np.zeros((len(states), len(texts), len(states)))
    for (state, row), action in product(enumerate(following), range(len(texts))):
        transitions[state, action, states.index(row[action]) if row[action] else state] = 1
    end = [[after is None for after in row] for row in following]
    start = [1 / dials.cues] * dials.cues + [0] * (len(states) - dials.cues)
    tables = (torch.tensor(np.array(x, dtype=float)) for x in (rewards, transitions, end, start))
    return TokenMDP(dials.letters, dials.length, False, GAMMA, *tables)


def expected_reward(mdp, log_pi):
    """The expected sum of rewards of an episode, without discount."""
    visits = replace(mdp, gamma=1.0).visitation(log_pi)[:, 0]
    return float(visits @ (mdp.action_log_probs(log_pi).exp() * mdp.rewards).sum(1))


SMALL = {"length": 2, "turns": 3, "letters": 3}
CASES = [
    {"deciding_tokens": 1, "deciding": "last"},
    {"deciding_tokens": 2},
    {"deciding_tokens": 2, "pay_every": 1},
    {"deciding_tokens": 2, "pay_every": 2},
    {"deciding_tokens": 2, "reward": "all_or_nothing"},
    {"deciding_tokens": 1, "reward": "all_or_nothing", "pay_every": 2},
    {"deciding_tokens": 2, "distractor": 0.2},
    {"deciding_tokens": 2, "distractor": 0.2, "pay_every": 2},
    {"deciding_tokens": 2, "distractor": 0.3, "reward": "all_or_nothing"},
    {"deciding_tokens": 1, "distractor": 0.3, "letters": 2, "length": 3, "deciding": 1},
    {"deciding_tokens": 1, "cues": 2, "turns": 2},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_oracle_the_optimum_is_that_of_the_enumerated_mdp(case):
    dials = Dials(**SMALL | case)
    mdp = enumerated(dials)
    shape = len(mdp.start), *mdp.tree.child.shape
    log_ref = torch.full(shape, -log(dials.letters), dtype=torch.float64)
    log_pi, value = mdp.solve_tokens(log_ref, BETA)
    optimum = solve(dials, BETA, GAMMA)
    assert optimum.value == pytest.approx(float(mdp.start @ value), abs=1e-12)
    _, by_action = mdp.solve_actions(log_ref, BETA)
    assert optimum.value == pytest.approx(float(mdp.start @ by_action), abs=1e-12)
    assert optimum.reward == pytest.approx(expected_reward(mdp, log_pi), abs=1e-10)
    assert optimum.uniform == pytest.approx(expected_reward(mdp, log_ref), abs=1e-10)
    assert optimum.value == pytest.approx(
        float(mdp.regularized_return(log_pi, log_ref, BETA)), abs=1e-10
    )


def test_one_letter_by_hand():
    weight = exp(1 / BETA)
    optimum = solve(Dials(length=5), BETA, GAMMA)
    assert optimum.value == pytest.approx(BETA * log((weight + 3) / 4))
    assert optimum.reward == pytest.approx(weight / (weight + 3))
    assert optimum.uniform == pytest.approx(1 / 4)
    assert solve(Dials(length=5), 0.0, GAMMA) == pytest.approx((1, 1, 1 / 4))


def test_a_distractor_is_worth_it_only_if_it_pays_more_than_it_forfeits():
    for distractor, reward in ((0.2, 1.0), (0.3, 1.2)):  # four turns of 0.3 are more than 1
        dials = Dials(turns=4, distractor=distractor, reward="all_or_nothing")
        assert solve(dials, 0.0, 1.0).reward == pytest.approx(reward)


def test_uniform_play_of_long_actions_earns_its_expectation():
    dials = {"length": 64, "turns": 8, "deciding_tokens": 4, "distractor": 0.02, "cues": 4}
    environment = CreditSuiteEnv(num_envs=4000, **dials)
    environment.reset(seed=0)
    random, earned = np.random.default_rng(0), 0.0
    for _ in range(8):
        letters = random.integers(ord("a"), ord("e"), (4000, 64), dtype=np.uint8)
        earned += environment.step([row.tobytes().decode() for row in letters])[1].mean()
    assert earned == pytest.approx(solve(Dials(**dials), BETA, GAMMA).uniform, abs=0.005)


def test_the_iteration_that_solves_a_run():
    assert solved_iteration([0.9, 0.9, 0.89, 0.92], 0.9, 3) == 3
    assert solved_iteration([1.0, 1.0], 0.9, 3) is None
    assert solved_iteration([0.0, 0.8, 0.95, 0.96], 0.9, 3) == 3
    assert solved_iteration([1.0, 1.0, 1.0, 0.0], 0.9, 3) == 2


@pytest.fixture
def rows(command, tmp_path, repeatable):
    """rows(name, *overrides): the metrics of a run of the experiment, and its folder."""

    def call(name, *overrides):
        arguments = ["experiment=credit_suite", *overrides, f"hydra.run.dir={tmp_path / name}"]
        ended = command(train.main, *arguments)
        assert ended.status == 0, ended.err
        return repeatable(tmp_path / name)[0]

    return call


def test_a_run_learns_ends_when_solved_and_logs_the_fraction(rows, command, tmp_path):
    solved = rows("run", "trainer.max_epochs=60")
    fractions = [float(row["suite/fraction"]) for row in solved]
    optimum = solve(Dials(deciding_tokens=2), 0.01, 0.99)
    assert len(solved) == solved_iteration(fractions, 0.9, 3) + 3 < 60
    for row, fraction in zip(solved, fractions, strict=True):
        assert float(row["suite/optimum"]) == pytest.approx(optimum.reward)
        reward = float(row["rollout/episode_reward"])
        expected = (reward - optimum.uniform) / (optimum.reward - optimum.uniform)
        assert fraction == pytest.approx(expected, abs=1e-6)
    summary = tmp_path / "run" / "summary.json"
    assert '"status": "finished"' in summary.read_text()
    summary.unlink()  # as if the run had been killed after its last checkpoint
    ended = command(train.main, f"ckpt_path={tmp_path / 'run'}")
    assert ended.status == 0, ended.err
    assert '"status": "finished"' in summary.read_text()
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == len(solved) + 1


@pytest.mark.parametrize("point", ["l64_t1", "l4_t32"])
def test_the_extreme_points_of_the_map_run(point, command, tmp_path):
    sizes = ("trainer.max_epochs=1", "rollout.update_epochs=1")
    ended = command(
        train.main, "experiment=credit_suite", f"point={point}", *sizes, f"hydra.run.dir={tmp_path}"
    )
    assert ended.status == 0, ended.err


def test_iterations_of_broken_episodes_are_refused(command, tmp_path):
    arguments = ("experiment=credit_suite", "environment.turns=3", f"hydra.run.dir={tmp_path}/run")
    ended = command(train.main, *arguments)
    assert ended.status == 2
    assert "rollout.actions_per_iteration=16: allowed are multiples of 48" in ended.err
    with pytest.raises(ConfigError):
        Dials(turns=0)
    assert OptimumFraction().state_dict() == {"fractions": []}
