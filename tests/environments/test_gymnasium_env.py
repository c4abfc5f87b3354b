"""Registered gymnasium environments as worlds: the contract, seeds, limits, threads, bad input."""

import threading

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from etpo.environments.gymnasium_env import GymnasiumEnv
from etpo.environments.text_env import AnyText
from etpo.errors import ConfigError, EnvironmentFailure


class Countdown(gymnasium.Env):
    """Starts at a drawn number; each action takes its length away; pays 1 at exactly zero."""

    during = staticmethod(lambda: None)  # called in every step

    def __init__(self, start=9, fields=("prefix",)):
        self.action_space = AnyText()
        self.observation_space = (
            spaces.Dict({field: AnyText() for field in fields}) if fields else AnyText()
        )
        self.start, self.fields = start, fields
        self.resets = []

    def observe(self):
        text = str(self.left)
        return dict.fromkeys(self.fields, text) if self.fields else text

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.resets.append((seed, options))
        self.left = int(self.np_random.integers(1, self.start + 1))
        return self.observe(), {}

    def step(self, action):
        self.during()
        self.left -= len(action)
        error = "too many" if self.left < 0 else None
        reward = float(self.left == 0)
        return self.observe(), reward, self.left <= 0, False, {"error": error, "cached": True}

    def render(self):
        return f"{self.left} left"


class Numbers(gymnasium.Env):
    action_space = spaces.Discrete(3)
    observation_space = spaces.Discrete(3)


gymnasium.register("test/Countdown-v0", entry_point=Countdown)
gymnasium.register("test/Numbers-v0", entry_point=Numbers)


def countdown(num_envs=3, **settings):
    return GymnasiumEnv(id="test/Countdown-v0", num_envs=num_envs, **settings)


def left(observations):
    return [int(o["prefix"]) for o in observations]


def test_copies_have_seeds_of_their_own_and_a_seed_decides_all():
    environment = countdown(4)
    observations, _ = environment.reset(seed=7, options={"evaluation": True})
    assert [env.unwrapped.resets for env in environment.envs] == [
        [(7 + i, {"evaluation": True})] for i in range(4)
    ]
    again, _ = environment.reset(seed=7)
    assert again == observations
    assert len(set(left(observations))) > 1


def test_the_options_of_a_reset_hold_for_the_episodes_after_it():
    environment = countdown(1)
    for options in ({"evaluation": True}, None):
        (before,) = left(environment.reset(seed=0, options=options)[0])
        environment.step(["x" * before])
        assert environment.envs[0].unwrapped.resets[-1] == (None, options)


def test_an_episode_that_ends_is_reset_in_the_same_step():
    environment = countdown(3, kwargs={"start": 4})
    before = left(environment.reset(seed=0)[0])
    actions = ["x" * before[0], "x" * (before[1] + 1), ""]
    observations, rewards, terminated, truncated, infos = environment.step(actions)
    assert rewards.tolist() == [1.0, 0.0, 0.0]
    assert terminated.tolist() == [True, True, False]
    assert not truncated.any()
    assert [o and o["prefix"] for o in infos["final_obs"]] == ["0", "-1", None]
    assert infos["error"].tolist() == [None, "too many", None]
    assert infos["attempt"].tolist() == [1, 1, 1]
    assert infos["cached"].all()
    assert left(observations)[2] == before[2]
    assert all(1 <= n <= 4 for n in left(observations))
    infos = environment.step(["", "", ""])[-1]
    assert infos["attempt"].tolist() == [1, 1, 2]


def test_a_step_limit_truncates_and_terminates_nothing():
    environment = countdown(1, max_episode_steps=2)
    environment.reset(seed=0)
    assert not environment.step([""])[3].any()
    _, _, terminated, truncated, infos = environment.step([""])
    assert truncated.tolist() == [True]
    assert terminated.tolist() == [False]
    assert infos["final_obs"][0] is not None


def test_a_part_steps_alone():
    environment = countdown(4)
    before = left(environment.reset(seed=3)[0])
    observations, rewards, *_, infos = environment.step_part(["", "x"], np.array([1, 3]))
    assert left(observations)[0] == before[1]
    assert len(rewards) == len(infos["error"]) == 2
    assert [env.unwrapped.left for env in environment.envs][:3] == before[:3]
    with pytest.raises(ValueError, match="2 actions for 4 environments"):
        environment.step(["", ""])


def test_copies_step_side_by_side(monkeypatch):
    together = threading.Barrier(8, timeout=30)  # breaks where they come one after the other
    monkeypatch.setattr(Countdown, "during", staticmethod(together.wait))
    environment = countdown(8)
    environment.reset(seed=0)
    assert len(environment.step([""] * 8)[0]) == 8


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ((), {"instruction": "5", "prefix": "5", "suffix": ""}),
        (("instruction",), {"instruction": "5", "prefix": "", "suffix": ""}),
        (
            ("instruction", "prefix", "suffix"),
            {"instruction": "5", "prefix": "5", "suffix": "5"},
        ),
    ],
)
def test_observations_have_all_fields(fields, expected):
    environment = countdown(1, kwargs={"fields": fields})
    environment.reset(seed=0)
    environment.envs[0].unwrapped.left = 5
    assert environment.step([""])[0] == (expected,)


def test_it_renders_and_closes_its_copies():
    environment = countdown(2)
    environment.reset(seed=0)
    assert all(text.endswith(" left") for text in environment.render())
    environment.close()
    assert environment.closed


def test_a_failure_of_an_environment_is_not_lost():
    environment = countdown(2)
    environment.reset(seed=0)
    with pytest.raises(EnvironmentFailure, match=r"copy 0: step\(\) raised TypeError") as raised:
        environment.step([None, ""])
    assert isinstance(raised.value.__cause__, TypeError)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"id": "test/Nothing-v0"}, "environment.id=test/Nothing-v0: "),
        ({"id": "no_such_module:Task-v0"}, "environment.id=no_such_module:Task-v0: "),
        ({"id": "test/Countdown-v0", "kwargs": {"end": 3}}, "environment.id=test/Countdown-v0: "),
        ({"id": "test/Numbers-v0"}, "whose actions are Text"),
        ({"id": "test/Countdown-v0", "kwargs": {"fields": ["text"]}}, "whose actions are Text"),
        ({"id": "test/Countdown-v0", "num_envs": 0}, "environment.num_envs=0"),
        ({"id": "test/Countdown-v0", "max_episode_steps": 0}, "environment.max_episode_steps=0"),
    ],
)
def test_bad_input_is_one_line_that_names_its_key(settings, message):
    with pytest.raises(ConfigError) as raised:
        GymnasiumEnv(**settings)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
