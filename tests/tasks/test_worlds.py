"""All small worlds: gymnasium's checks, seeds, disjoint parts, choices and parallel copies."""

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from etpo.environments.gymnasium_env import GymnasiumEnv
from etpo.errors import ConfigError
from etpo_tasks import arithmetic, frozen_lake, guess_number, sokoban
from etpo_tasks.worlds import Split, draw, split_of

WORLDS = {
    "arithmetic": (arithmetic.ArithmeticEnv, {"choices": True}),
    "frozen_lake": (frozen_lake.TextFrozenLakeEnv, {"level": 2}),
    "slippery": (frozen_lake.TextFrozenLakeEnv, {"level": 3}),
    "guess_number": (guess_number.GuessNumberEnv, {"starts": 85}),
    "sokoban": (sokoban.SokobanEnv, {"level": 2}),
}
IDS = {
    "arithmetic": "etpo_tasks.arithmetic:etpo/Arithmetic-v0",
    "frozen_lake": "etpo_tasks.frozen_lake:etpo/FrozenLake-v0",
    "guess_number": "etpo_tasks.guess_number:etpo/GuessNumber-v0",
    "sokoban": "etpo_tasks.sokoban:etpo/Sokoban-v0",
}


@pytest.fixture(params=WORLDS)
def world(request):
    made, options = WORLDS[request.param]
    return made(render_mode="ansi", **options)


def play(environment, seed, steps=12, evaluation=False):
    """Return the observations and results of uniformly random admissible actions."""
    random = np.random.default_rng(seed + 1)
    seen = [environment.reset(seed=seed, options={"evaluation": evaluation})[0]]
    for _ in range(steps):
        action = random.choice(seen[-1]["choices"])
        observation, reward, terminated, truncated, info = environment.step(str(action))
        assert info["error"] is None
        seen.append(observation | {"reward": reward, "terminated": terminated})
        if terminated or truncated:
            seen.append(environment.reset(options={"evaluation": evaluation})[0])
    return seen


def test_gymnasium_accepts_the_world(world):
    check_env(world)


def test_a_seed_repeats_all_episodes(world):
    once = play(world, 3)
    play(world, 4)
    assert play(world, 3) == once


def test_no_instance_of_training_is_held_out(world):
    train = {world.reset(seed=seed)[0]["instruction"] for seed in range(100)}
    options = {"evaluation": True}
    held_out = {world.reset(seed=s, options=options)[0]["instruction"] for s in range(100)}
    shown = {question["instruction"] for question, _ in world.examples(5)}
    assert len(train) > 20
    assert len(held_out) > 10
    assert not train & held_out
    assert not shown & (train | held_out)


def test_examples_are_the_right_actions(world):
    examples = world.examples(5)
    assert len(examples) == 5
    assert world.examples(3) == examples[:3]
    observation = world.reset(seed=0)[0]
    assert all(set(question) == {"instruction", "prefix"} for question, _ in examples)
    actions = set(observation["choices"])
    if isinstance(world, guess_number.GuessNumberEnv):  # examples have a range of their own
        actions = set(map(str, range(1, 100)))
    assert {action for _, action in examples} <= actions


def test_a_prompt_ends_with_the_blank_before_the_action(world):
    prefix = world.reset(seed=0)[0]["prefix"]
    assert prefix == f"{prefix.rstrip()} "


def test_another_action_is_a_failure(world):
    world.reset(seed=0)
    _, reward, _, _, info = world.step("Sing a song.\nand more")
    assert reward == 0
    assert info["error"] in ("'Sing a song' is not possible", "'Sing' is not possible")


def test_choices_can_be_left_out(world):
    other = type(world)(choices=False)
    observation, _ = other.reset(seed=0)
    assert set(observation) == {"instruction", "prefix"}
    assert observation in other.observation_space


@pytest.mark.parametrize("name", IDS)
def test_copies_play_in_parallel_as_they_do_alone(name):
    made = GymnasiumEnv(id=IDS[name], num_envs=4, kwargs={"choices": True})
    seen = [made.reset(seed=5)[0]]
    for _ in range(10):
        seen.append(made.step([o["choices"][-1] for o in seen[-1]])[0])
    alone = gymnasium.make(IDS[name], choices=True)
    observation, _ = alone.reset(seed=7)
    for now in seen[:-1]:
        assert observation["prefix"] == now[2]["prefix"]
        observation, _, terminated, truncated, _ = alone.step(observation["choices"][-1])
        if terminated or truncated:
            observation, _ = alone.reset()


def test_a_group_of_copies_has_one_question_and_evaluation_has_none():
    made = GymnasiumEnv(id=IDS["arithmetic"], num_envs=12, group_size=4)
    for observations in (made.reset(seed=0)[0], made.step(["1", "2", "3", "4"] * 3)[0]):
        questions = [o["instruction"] for o in observations]
        assert all(len(set(questions[i : i + 4])) == 1 for i in (0, 4, 8))
        assert len(set(questions)) == 3
    observations, _ = made.reset(seed=0, options={"evaluation": True})
    assert len({o["instruction"] for o in observations}) > 6


@pytest.mark.parametrize("size", [0, 5, 13])
def test_a_group_size_that_does_not_fit_is_one_line(size):
    with pytest.raises(ConfigError, match=rf"^environment\.group_size={size}: allowed"):
        GymnasiumEnv(id=IDS["arithmetic"], num_envs=12, group_size=size)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("arithmetic", "operations", "sums"),
        ("arithmetic", "operations", ["sums", "roots"]),
        ("arithmetic", "operations", []),
        ("arithmetic", "smallest", 5),
        ("arithmetic", "choices", 1),
        ("arithmetic", "split_seed", -1),
        ("guess_number", "numbers", 1),
        ("guess_number", "starts", 0),
        ("guess_number", "guesses", 16),
        ("guess_number", "example_games", -1),
        ("sokoban", "level", 4),
        ("sokoban", "step_cost", -0.1),
        ("frozen_lake", "level", "1"),
    ],
)
def test_bad_input_is_one_line_that_names_its_key(name, key, value):
    with pytest.raises(ConfigError) as raised:
        WORLDS[name][0](**{key: value})
    assert str(raised.value).startswith(f"environment.kwargs.{key}={value}: allowed")


def test_an_empty_part_is_one_line():
    text = next(str(i) for i in range(100) if split_of(str(i)) is Split.TRAIN)
    with pytest.raises(ConfigError, match="the held-out part is empty"):
        draw(lambda: text, Split.HELD_OUT)
