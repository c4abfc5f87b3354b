"""TextWorld's games: made by seed, played alone and in parallel, and kept on disk."""

import threading
from pathlib import Path

import pytest
from gymnasium.utils.env_checker import check_env

from etpo.environments.gymnasium_env import GymnasiumEnv
from etpo.errors import ConfigError

pytest.importorskip("textworld")

from etpo_tasks.textworld_env import LEVELS, Level, TextWorldEnv, game_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("games")


@pytest.fixture
def small(folder):
    return TextWorldEnv(level=1, games=2, cache_dir=str(folder), render_mode="ansi")


def solution(environment):
    """Return the commands that solve the game of an environment, from TextWorld's own search."""
    import textworld

    infos = textworld.EnvInfos(policy_commands=True)
    player = textworld.start(str(environment.game), infos)
    return player.reset().policy_commands


def test_the_solution_pays_one_and_ends_the_game(small):
    for seed in range(3):
        observation, _ = small.reset(seed=seed)
        commands = solution(small)
        rewards = []
        for command in commands:
            assert command in observation["choices"]
            observation, reward, terminated, _, info = small.step(command.upper())
            assert info["error"] is None
            rewards.append(reward)
        assert sum(rewards) == 1
        assert rewards[-1] > 0
        assert terminated


def test_gymnasium_accepts_it(small):
    check_env(small)


def test_commands_without_effect_are_no_choice(small):
    observation, _ = small.reset(seed=0)
    assert not any(c.startswith(("examine", "look", "inventory")) for c in observation["choices"])
    observation, reward, terminated, _, info = small.step("dance")
    assert (reward, terminated) == (0.0, False)
    assert info["error"] == "'dance' is not possible"
    assert observation["prefix"].endswith("\n> 'dance' is not possible\n> ")


def test_games_of_training_and_evaluation_differ_and_examples_are_solutions(small):
    train = {small.reset(seed=s)[0]["instruction"] for s in range(8)}
    held_out = {
        small.reset(seed=s, options={"evaluation": True})[0]["instruction"] for s in range(8)
    }
    assert (len(train), len(held_out)) == (2, 2)
    before = small.observe()
    examples = small.examples(3)
    assert small.observe() == before
    assert not {question["instruction"] for question, _ in examples} & (train | held_out)
    assert all(action for _, action in examples)


@pytest.mark.slow
def test_several_quests_pay_in_parts(folder):
    environment = TextWorldEnv(level=3, games=1, cache_dir=str(folder))
    environment.reset(seed=0)
    rewards = [environment.step(command)[1] for command in solution(environment)]
    assert sorted(set(rewards)) == [0.0, 0.5]
    assert sum(rewards) == 1


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_games(folder):
    environment = TextWorldEnv(level=1, games=4, cache_dir=str(folder))
    size = []
    for number in range(150):
        environment.reset(seed=number)
        size.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20)
    assert size[-1] - size[50] < 15  # 0.8 MiB per game with one player for all games


def play(folder, num_envs):
    environment = GymnasiumEnv(
        id="etpo_tasks.textworld_env:etpo/TextWorld-v0",
        num_envs=num_envs,
        kwargs={"level": 1, "games": 2, "cache_dir": str(folder)},
    )
    seen = [environment.reset(seed=3)[0]]
    for _ in range(25):
        seen.append(environment.step([o["choices"][0] for o in seen[-1]])[0])
    environment.close()
    return seen


def test_copies_in_threads_play_as_one_does_alone(folder):
    together, alone = play(folder, 6), play(folder, 1)
    assert [observations[0] for observations in together] == [o[0] for o in alone]


def test_a_game_is_made_once_also_by_several_threads(tmp_path):
    files = []
    threads = [
        threading.Thread(target=lambda: files.append(game_file(tmp_path, LEVELS[1], 5)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(files)) == 1
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".z8"]  # no leftovers
    made = files[0].stat().st_mtime_ns
    assert game_file(tmp_path, LEVELS[1], 5).stat().st_mtime_ns == made
    assert game_file(tmp_path, Level(1, 2, 1), 5) != files[0]


@pytest.mark.parametrize(("key", "value"), [("level", 5), ("games", 0)])
def test_bad_input_is_one_line_that_names_its_key(key, value):
    with pytest.raises(ConfigError, match=rf"^environment\.kwargs\.{key}={value}: allowed"):
        TextWorldEnv(**{key: value})


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    environment = TextWorldEnv(level=1, cache_dir=str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"^environment\.kwargs\.cache_dir=.*/file: .*allowed"):
        environment.reset(seed=0)
