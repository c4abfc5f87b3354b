"""The credit suite: its dials, its rewards and how its episodes go."""

import numpy as np
import pytest

from etpo.errors import ConfigError
from etpo_tasks.credit_suite import CreditSuiteEnv, Dials


def words(environment, wrong=(), lured=()):
    """The actions that are right in every turn, with places that are wrong or the distractor."""
    d = environment.dials
    letters = environment.right_letters(np.arange(environment.num_envs))
    letters[:, list(lured)] += 1
    letters[:, list(wrong)] += 2
    rows = []
    for row in letters % d.letters:
        text = ["d"] * d.length  # free letters
        for position, letter in zip(d.positions, row, strict=True):
            text[position] = environment.alphabet[letter]
        rows.append("".join(text))
    return rows


def play(environment, *mistakes):
    """The rewards of one episode, with the keywords of `words` for each turn."""
    environment.reset(seed=0)
    rewards, ends = [], []
    for mistake in mistakes:
        _, reward, ended, truncated, infos = environment.step(words(environment, **mistake))
        assert infos["error"].tolist() == [None] * environment.num_envs
        assert not truncated.any()
        assert len(set(reward)) == 1
        rewards.append(reward[0])
        ends.append(bool(ended.all()))
    assert ends == [False] * (len(mistakes) - 1) + [True]
    return rewards


RIGHT, HALF, NONE, LURED = {}, {"wrong": [1]}, {"wrong": [0, 1]}, {"lured": [0]}


@pytest.mark.parametrize(
    ("dials", "turns", "expected"),
    [
        # two deciding letters in each of three turns: a sixth of the reward each
        ({}, [RIGHT, RIGHT, RIGHT], [0, 0, 1]),
        ({}, [RIGHT, HALF, NONE], [0, 0, 1 / 2]),
        ({"pay_every": 1}, [RIGHT, HALF, NONE], [1 / 3, 1 / 6, 0]),
        ({"pay_every": 2}, [RIGHT, HALF, HALF], [0, 1 / 2, 1 / 6]),
        ({"reward": "all_or_nothing"}, [RIGHT, RIGHT, RIGHT], [0, 0, 1]),
        ({"reward": "all_or_nothing"}, [RIGHT, RIGHT, HALF], [0, 0, 0]),
        ({"reward": "all_or_nothing", "pay_every": 2}, [RIGHT, RIGHT, HALF], [0, 2 / 3, 0]),
        ({"reward": "all_or_nothing", "pay_every": 1}, [RIGHT, HALF, RIGHT], [1 / 3, 0, 0]),
        # what was earned before the distractor is kept, if a wrong letter does not forfeit it
        ({"distractor": 0.1}, [RIGHT, LURED, RIGHT], [0, 0.1, 1 / 3]),
        ({"distractor": 0.1}, [LURED, LURED, NONE], [0.1, 0.1, 0]),
        ({"distractor": 0.1, "reward": "all_or_nothing"}, [RIGHT, LURED, RIGHT], [0, 0.1, 0]),
        # an ordinary wrong letter without a distractor
        ({}, [LURED, RIGHT, RIGHT], [0, 0, 5 / 6]),
    ],
)
def test_rewards_by_hand(dials, turns, expected):
    environment = CreditSuiteEnv(num_envs=3, turns=3, deciding_tokens=2, **dials)
    assert play(environment, *turns) == pytest.approx(expected)
    assert play(environment, *turns) == pytest.approx(expected)  # nothing is left of an episode


@pytest.mark.parametrize(
    ("deciding", "count", "length", "expected"),
    [
        ("first", 2, 8, [0, 1]),
        ("last", 2, 8, [6, 7]),
        ("middle", 2, 8, [3, 4]),
        ("middle", 1, 5, [2]),
        ("spread", 2, 8, [2, 6]),
        ("spread", 4, 64, [8, 24, 40, 56]),
        ("spread", 3, 3, [0, 1, 2]),
        (5, 2, 8, [5, 6]),
        (0, 1, 1, [0]),
    ],
)
def test_places_of_the_deciding_letters(deciding, count, length, expected):
    dials = Dials(length=length, deciding=deciding, deciding_tokens=count)
    assert dials.positions.tolist() == expected


@pytest.mark.parametrize(
    ("every", "expected"), [(None, [4] * 5), (1, [0, 1, 2, 3, 4]), (2, [1, 1, 3, 3, 4])]
)
def test_paydays(every, expected):
    assert Dials(turns=5, pay_every=every).paydays.tolist() == expected


def test_observations_show_what_varies_and_matters():
    dials = {"turns": 2, "cues": 3, "noise_bits": 4, "distractor": 0.1, "shows_earnings": False}
    environment = CreditSuiteEnv(num_envs=400, **dials)
    observations, _ = environment.reset(seed=0)
    parts = [o["prefix"].split() for o in observations]
    assert {tuple(p[:2]) for p in parts} == {("turn0", "open")}
    assert {p[2] for p in parts} == {"cue0", "cue1", "cue2"}
    assert len({p[3] for p in parts}) == 16
    after, _, _, _, infos = environment.step(words(environment, lured=[0]))
    following = [o["prefix"].split() for o in after]
    assert {tuple(p[:2]) for p in following} == {("turn1", "lost")}
    assert [p[2] for p in following] == [p[2] for p in parts]  # one cue per episode
    assert infos["attempt"].tolist() == [1] * 400
    began, _, ended, _, infos = environment.step(words(environment))
    assert ended.all()
    assert {o["prefix"].split()[2] for o in began} == {"cue0", "cue1", "cue2"}
    assert [o["prefix"].split()[2] for o in began] != [p[2] for p in parts]
    assert {o["prefix"].split()[1] for o in infos["final_obs"]} == {"lost"}
    plain = CreditSuiteEnv(turns=2, shows_earnings=False)
    assert plain.reset(seed=0)[0][0]["prefix"] == "turn0"


def test_an_observation_shows_what_is_not_paid_yet():
    environment = CreditSuiteEnv(turns=4, length=4, deciding_tokens=4, pay_every=2)
    seen = [environment.reset(seed=0)[0]]
    seen += [environment.step(words(environment))[0] for _ in range(3)]
    assert [o[0]["prefix"] for o in seen] == [
        "turn0 earned00",
        "turn1 earned04",
        "turn2 earned00",  # paid
        "turn3 earned04",
    ]


def test_a_cue_of_each_turn():
    environment = CreditSuiteEnv(num_envs=200, turns=2, cues=2, cue_drawn="turn")
    first, _ = environment.reset(seed=0)
    second = environment.step(words(environment))[0]
    pairs = {(a["prefix"], b["prefix"]) for a, b in zip(first, second, strict=True)}
    assert len(pairs) == 4
    assert (environment.step(words(environment))[1] > 0).all()


def test_a_cue_selects_other_letters():
    environment = CreditSuiteEnv(num_envs=200, cues=4)
    environment.reset(seed=0)
    cues, letters = environment.cue, environment.right_letters(np.arange(200))
    assert len(np.unique(np.column_stack([cues, letters]), axis=0)) == 4
    assert len(np.unique(letters)) == 4


def test_another_text_is_a_failure_with_wrong_letters():
    environment = CreditSuiteEnv(num_envs=5, length=2, deciding_tokens=2, pay_every=1)
    environment.reset(seed=0)
    (right, *_) = words(environment)
    _, rewards, ended, _, infos = environment.step([right, "", right + "a", right[0] + "é", "ez"])
    assert rewards.tolist() == [1, 0, 0, 0, 0]
    assert [error is None for error in infos["error"]] == [True] + [False] * 4
    assert infos["error"][1] == "an action has 2 letters of abcd"
    assert ended.all()


def test_a_part_of_the_environments_steps():
    environment = CreditSuiteEnv(num_envs=4, turns=2, pay_every=1)
    environment.reset(seed=0)
    right = words(environment)
    observations, rewards, *_ = environment.step_part([right[1], right[3]], np.array([1, 3]))
    assert [o["prefix"] for o in observations] == ["turn1 earned0"] * 2
    assert rewards.tolist() == [0.5, 0.5]
    assert environment.turn.tolist() == [0, 1, 0, 1]


def test_a_seed_repeats_and_letters_depend_on_the_target_seed_alone():
    dials = {"num_envs": 8, "turns": 4, "cues": 4, "noise_bits": 3, "deciding_tokens": 4}
    one, same = CreditSuiteEnv(**dials), CreditSuiteEnv(**dials)
    assert one.reset(seed=3)[0] == same.reset(seed=3)[0]
    assert one.reset(seed=4)[0] != same.reset(seed=3)[0]
    assert (one.base == same.base).all()
    assert (one.base != CreditSuiteEnv(**dials, target_seed=1).base).any()


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"length": 0}, "environment.length=0: allowed is from 1 to 64"),
        ({"length": 65}, "environment.length=65: allowed is from 1 to 64"),
        ({"turns": 33}, "environment.turns=33: allowed is from 1 to 32"),
        ({"turns": 1.5}, "environment.turns=1.5: .* an integer"),
        ({"deciding_tokens": 5}, "environment.deciding_tokens=5: allowed is from 1 to 4"),
        ({"deciding": "end"}, "environment.deciding=end: allowed are first, .* from 0 to 3"),
        ({"deciding": 3, "deciding_tokens": 2}, "environment.deciding=3: .* from 0 to 2"),
        ({"deciding": True}, "environment.deciding=True: allowed"),
        ({"deciding": None}, "environment.deciding=None: allowed"),
        ({"reward": "sparse"}, "environment.reward=sparse: allowed are additive"),
        ({"pay_every": 0}, "environment.pay_every=0: allowed is from 1 to 1"),
        ({"pay_every": 3, "turns": 2}, "environment.pay_every=3: allowed is from 1 to 2"),
        ({"distractor": 1.5}, "environment.distractor=1.5: allowed is a number"),
        ({"distractor": "x"}, "environment.distractor=x: allowed is a number"),
        ({"letters": 1}, "environment.letters=1: allowed is from 2 to 8"),
        ({"cues": 5}, "environment.cues=5: allowed is from 1 to 4"),
        ({"cue_drawn": "step"}, "environment.cue_drawn=step: allowed are episode, turn"),
        ({"noise_bits": -1}, "environment.noise_bits=-1: allowed is from 0 to 16"),
        ({"target_seed": -1}, "environment.target_seed=-1: allowed is from 0"),
        ({"num_envs": 0}, "environment.num_envs=0: allowed is 1 or more"),
    ],
)
def test_values_that_are_refused_in_one_line(dials, message):
    with pytest.raises(ConfigError, match=message) as caught:
        CreditSuiteEnv(**dials)
    assert "\n" not in str(caught.value)
