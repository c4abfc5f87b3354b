"""The token MDP as a text environment: its texts, its draws and how its episodes end."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from etpo.errors import ConfigError
from etpo_tasks.token_mdp_env import TokenMDPEnv, action_texts, random_mdp, state_texts

SHAPE = {"seed": 0, "num_states": 3, "vocabulary_size": 3, "length": 2}


def mdp(**changes):
    return random_mdp(**(SHAPE | changes))


def states(environment, observations):
    """The numbers of the states that observations show."""
    numbers = {o["prefix"]: number for number, o in enumerate(environment.observations)}
    return [numbers[o["prefix"]] for o in observations]


def test_texts_and_actions_by_hand():
    # letters a and b, the end token 2; at most two tokens
    small = mdp()
    spelled = {
        tuple(token for _, token in path): text
        for path, text in zip(small.tree.paths, action_texts(small), strict=True)
    }
    assert spelled == {
        (2,): "",
        (0, 2): "a",
        (1, 2): "b",
        (0, 0): "aa",
        (0, 1): "ab",
        (1, 0): "ba",
        (1, 1): "bb",
    }
    assert state_texts(small) == ["aa", "ab", "ba"]


@pytest.mark.parametrize(("vocabulary_size", "length"), [(3, 1), (3, 4), (4, 3), (6, 2)])
def test_texts_and_actions_are_one_to_one(vocabulary_size, length):
    texts = action_texts(mdp(vocabulary_size=vocabulary_size, length=length))
    assert len(set(texts)) == len(texts)
    assert len(texts) == sum((vocabulary_size - 1) ** n for n in range(length + 1))
    assert max(map(len, texts)) == length


@pytest.mark.parametrize("num_states", [1, 2, 3, 9])
def test_states_and_texts_are_one_to_one_and_of_one_width(num_states):
    texts = state_texts(mdp(num_states=num_states))
    assert len(set(texts)) == len(texts) == num_states
    assert len(set(map(len, texts))) == 1


def test_every_action_is_paid_its_reward_in_every_state():
    small = replace(mdp(), termination=torch.zeros(3, 7, dtype=torch.float64))
    environment = TokenMDPEnv(mdp=small, num_envs=7)
    observations, _ = environment.reset(seed=0)
    seen = set()
    for _ in range(20):
        at = states(environment, observations)
        observations, rewards, *_ = environment.step(action_texts(small))
        assert rewards.tolist() == small.rewards[at, range(7)].tolist()
        seen.update(at)
    assert seen == {0, 1, 2}


def test_transitions_terminations_and_starts_have_the_frequencies_of_the_tables():
    start = torch.tensor([0.4, 0.35, 0.25], dtype=torch.float64)
    small, count = replace(mdp(), start=start), 4000
    environment = TokenMDPEnv(mdp=small, num_envs=count)
    observations, _ = environment.reset(seed=1)
    starts = np.bincount(states(environment, observations), minlength=3) / count
    assert starts == pytest.approx(small.start.numpy(), abs=0.03)
    for text in ("", "ab"):
        action = action_texts(small).index(text)
        environment.reset(seed=2)
        observations, _, terminated, _, infos = environment.step([text] * count)
        after = np.array(states(environment, observations))
        began, _ = environment.reset(seed=2)
        began = np.array(states(environment, began))
        for state in range(3):
            rows = began == state
            expected = small.termination[state, action].item()
            assert terminated[rows].mean() == pytest.approx(expected, abs=0.05)
            moved = np.bincount(after[rows & ~terminated], minlength=3)
            assert moved / moved.sum() == pytest.approx(
                small.transitions[state, action].numpy(), abs=0.05
            )
        # what ended began anew
        fresh = np.bincount(after[terminated], minlength=3)
        assert fresh / fresh.sum() == pytest.approx(small.start.numpy(), abs=0.08)
        assert [final is not None for final in infos["final_obs"]] == terminated.tolist()


def play(environment, seed, steps=12):
    observations, _ = environment.reset(seed=seed)
    story = [observations]
    for _ in range(steps):
        observations, rewards, terminated, truncated, _ = environment.step(["a", "ab", "", "bb"])
        story.append((observations, *map(np.ndarray.tolist, (rewards, terminated, truncated))))
    return story


def test_a_seed_repeats_and_another_one_does_not():
    environment, other = (TokenMDPEnv(mdp=mdp(), num_envs=4) for _ in range(2))
    first = play(environment, seed=0)
    assert play(environment, seed=0) == first
    assert play(other, seed=0) == first
    assert play(environment, seed=1) != first
    assert torch.equal(mdp().rewards, mdp().rewards)
    assert not torch.equal(mdp().rewards, mdp(seed=1).rewards)


def test_a_time_limit_truncates_and_shows_the_true_next_state():
    chain = mdp()
    transitions = torch.zeros_like(chain.transitions)
    transitions[0, :, 1] = transitions[1, :, 2] = transitions[2, :, 2] = 1
    start = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    endless = torch.zeros_like(chain.termination)
    chain = replace(chain, transitions=transitions, start=start, termination=endless)
    environment = TokenMDPEnv(mdp=chain, num_envs=2, time_limit=2)
    environment.reset(seed=0)
    observations, _, terminated, truncated, infos = environment.step(["a", ""])
    assert states(environment, observations) == [1, 1]
    assert not terminated.any()
    assert not truncated.any()
    assert infos["final_obs"].tolist() == [None, None]
    observations, _, terminated, truncated, infos = environment.step(["a", ""])
    assert states(environment, observations) == [0, 0]
    assert not terminated.any()
    assert truncated.all()
    assert states(environment, infos["final_obs"]) == [2, 2]
    assert infos["attempt"].tolist() == [2, 2]
    assert environment.step(["a", ""])[4]["attempt"].tolist() == [1, 1]


def test_an_episode_that_terminates_at_its_time_limit_is_not_truncated():
    mortal = replace(mdp(), termination=torch.ones(3, 7, dtype=torch.float64))
    environment = TokenMDPEnv(mdp=mortal, num_envs=2, time_limit=1)
    environment.reset(seed=0)
    _, _, terminated, truncated, _ = environment.step(["a", "b"])
    assert terminated.all()
    assert not truncated.any()


def test_letters_beyond_the_length_are_not_read_and_other_characters_fail():
    small = replace(mdp(), termination=torch.zeros(3, 7, dtype=torch.float64))
    environment = TokenMDPEnv(mdp=small, num_envs=3)
    observations, _ = environment.reset(seed=0)
    at = states(environment, observations)
    _, rewards, terminated, _, infos = environment.step(["abba", "a b", "c"])
    assert rewards[0] == small.rewards[at[0], action_texts(small).index("ab")]
    assert rewards[1:].tolist() == [small.rewards.min()] * 2
    assert terminated.tolist() == [False, True, True]
    assert infos["error"][0] is None
    assert infos["error"][1] == "' ' is none of the letters ab"
    with pytest.raises(ValueError, match="1 actions for 3 environments"):
        environment.step(["a"])


def test_rewards_that_are_given():
    given = mdp(rewards=[{"": 1.0, "ab": -2}, {}, {"b": 0.5}])
    texts = action_texts(given)
    assert given.rewards[0, texts.index("")] == 1
    assert given.rewards[0, texts.index("ab")] == -2
    assert given.rewards[2, texts.index("b")] == 0.5
    assert given.rewards.abs().sum() == 3.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": -1}, "environment.mdp.seed=-1: allowed is from 0"),
        ({"num_states": 0}, "environment.mdp.num_states=0: allowed is from 1 to 100"),
        ({"num_states": 2.0}, "environment.mdp.num_states=2.0: .* an integer"),
        ({"vocabulary_size": 2}, "environment.mdp.vocabulary_size=2: allowed is from 3 to 27"),
        ({"length": 0}, "environment.mdp.length=0: allowed is from 1 to 9"),
        ({"length": 10**9}, "environment.mdp.length=1000000000: allowed is from 1 to 9"),
        (
            {"length": 7, "vocabulary_size": 4},
            "environment.mdp.length=7: allowed with 3 letters .* 1000 texts",
        ),
        ({"rewards": 3}, "environment.mdp.rewards=3: allowed is a list of 3 mappings"),
        ({"rewards": [{}]}, "environment.mdp.rewards=.*: allowed is a list of 3 mappings"),
        ({"rewards": [{}, {}, 1]}, r"environment.mdp.rewards\[2\]=1: allowed is a mapping"),
        ({"rewards": [{"c": 1}, {}, {}]}, r"rewards\[0\]: no action 'c'; .* letters of ab"),
        ({"rewards": [{"a": "x"}, {}, {}]}, r"rewards\[0\].a=x: allowed is a number"),
        ({"rewards": [{"a": float("nan")}, {}, {}]}, r"rewards\[0\].a=nan: allowed"),
    ],
)
def test_tables_that_are_refused_in_one_line(changes, words):
    with pytest.raises(ConfigError, match=words) as caught:
        mdp(**changes)
    assert "\n" not in str(caught.value)


def test_choices_are_texts_of_the_mdp_and_the_same_in_every_run():
    first, again = (TokenMDPEnv(mdp=mdp(), num_choices=4).observations for _ in range(2))
    assert first == again
    texts = action_texts(mdp())
    for observation in first:
        assert len(set(observation["choices"])) == 4
        assert set(observation["choices"]) < set(texts)
    assert len({observation["choices"] for observation in first}) > 1
    assert all("choices" not in o for o in TokenMDPEnv(mdp=mdp()).observations)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_choices": 0}, "environment.num_choices=0: allowed is from 1 to 7"),
        ({"num_choices": 8}, "environment.num_choices=8: allowed is from 1 to 7"),
        ({"num_envs": 0}, "environment.num_envs=0: allowed is 1 or more"),
        ({"time_limit": 0}, "environment.time_limit=0: allowed is 1 or more"),
        ({"time_limit": 1.5}, "environment.time_limit=1.5: .* an integer"),
    ],
)
def test_values_that_are_refused_in_one_line(changes, words):
    with pytest.raises(ConfigError, match=words):
        TokenMDPEnv(mdp=mdp(), **changes)
