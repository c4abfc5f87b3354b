"""TextArena's games as gymnasium environments: rewards, refusals, seeds, and each game by name."""

import random

import gymnasium
import pytest

from etpo.environments.gymnasium_env import GymnasiumEnv
from etpo.errors import ConfigError, EnvironmentFailure

textarena = pytest.importorskip("textarena")

MOVES = {
    "FrozenLake-v0-train": ["[right]", "[down]"],
    "GuessTheNumber-v0-train": ["[5]", "[12]", "[17]"],
    "TowerOfHanoi-v0-train": ["[A C]", "[A B]"],
    "Mastermind-v0-train": ["[1 2 3 4]", "[2 3 4 5]"],
    "Blackjack-v0-train": ["[Hit]", "[Stand]"],
    "Bandit-v0-train": ["[red]", "[blue]"],
    "LightsOut-v0": ["[0 0]", "[1 1]"],
    "2048-v0-train": ["[up]", "[left]"],
    "Minesweeper-v0-train": ["[2 2]", "[0 0]", "[7 7]"],
}


def copies(game, num_envs=2, **options):
    return GymnasiumEnv(
        id="etpo_tasks.textarena_env:etpo/TextArena-v0",
        num_envs=num_envs,
        kwargs={"game": game, "options": options},
    )


def play(environment, moves, rounds, seed=0):
    """Return observations, rewards, ends and errors of some rounds of equal moves."""
    observations, _ = environment.reset(seed=seed)
    seen = [observations]
    for number in range(rounds):
        move = moves[number % len(moves)]
        observations, rewards, ended, _, infos = environment.step([move] * environment.num_envs)
        seen.append((observations, rewards.tolist(), ended.tolist(), infos["error"].tolist()))
    return seen


@pytest.mark.parametrize("game", MOVES)
def test_a_seed_decides_a_game_and_the_global_generator_is_left_alone(game):
    before = random.getstate()
    once = play(copies(game), MOVES[game], 6)
    assert random.getstate() == before
    random.random()
    assert play(copies(game), MOVES[game], 6) == once
    assert once[0][0]["prefix"]


def test_copies_draw_independently():
    first, second = play(copies("FrozenLake-v0-train"), ["[right]"], 0)[0]
    assert first != second  # two lakes
    # what a copy draws does not depend on those beside it
    alone = play(copies("2048-v0-train", 1), MOVES["2048-v0-train"], 6)
    beside = play(copies("2048-v0-train", 3), MOVES["2048-v0-train"], 6)
    assert [seen[0][0] for seen in alone[1:]] == [seen[0][0] for seen in beside[1:]]


def guess(environment, number):
    return environment.step([f"I say [{number}]"])


def test_a_game_pays_at_its_end():
    environment = copies("GuessTheNumber-v0-train", 1, min_number=1, max_number=3)
    environment.reset(seed=0)
    number = environment.envs[0].unwrapped._game.game_number
    wrong = 1 if number > 1 else 2
    _, rewards, ended, _, infos = guess(environment, wrong)
    assert (rewards[0], ended[0], infos["error"][0]) == (0.0, False, None)
    observations, rewards, ended, truncated, infos = guess(environment, number)
    assert (rewards[0], ended[0], truncated[0]) == (1.0, True, False)
    assert "The target number is" in infos["final_obs"][0]["prefix"]
    assert "The target number is" not in observations[0]["prefix"]  # the next game's


def test_an_invalid_move_is_an_error_and_a_second_one_ends_the_game():
    environment = copies("GuessTheNumber-v0-train", 1)
    environment.reset(seed=0)
    _, _, ended, _, infos = guess(environment, 99)
    assert not ended[0]
    assert (
        infos["error"][0] == "Invalid move. Player 0 guessed a number outside the range specified."
    )
    _, _, ended, _, infos = guess(environment, 99)
    assert ended[0]
    assert infos["error"][0].startswith("Invalid Move: ")


def test_what_was_read_last_is_rendered():
    environment = gymnasium.make(
        "etpo/TextArena-v0", game="FrozenLake-v0-train", render_mode="ansi"
    ).unwrapped
    observation, _ = environment.reset(seed=0)
    assert environment.render() == observation["instruction"]


def test_a_game_that_is_not_known_is_one_line():
    with pytest.raises(ConfigError, match=r"^environment.kwargs.game=Go: allowed are names of"):
        copies("Go")


@pytest.mark.parametrize(
    ("game", "message"),
    [
        ("TicTacToe-v0-train", "number of players"),
        ("LightsOut-v0-train", "Missing required observation types"),  # a fault of TextArena's own
    ],
)
def test_a_game_that_cannot_be_played_alone_is_one_line(game, message):
    environment = copies(game, 1)
    with pytest.raises(ConfigError, match=f"^environment.kwargs.game={game}: .*{message}"):
        environment.reset(seed=0)


NO_WORDS = "Resource 'words' not found. >>> import nltk >>> nltk.download('words')"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (LookupError(NO_WORDS), "python -m nltk.downloader words"),
        (ValueError("OpenRouter API key not found.\nSet OPENROUTER_API_KEY"), "OPENROUTER_API_KEY"),
    ],
)
def test_a_game_that_lacks_its_words_or_a_key_is_one_line_when_made(monkeypatch, error, words):
    def make(game, **options):
        raise error

    monkeypatch.setattr(textarena, "make", make)
    with pytest.raises(ConfigError) as raised:
        copies("Wordle-v0-train")
    line = str(raised.value)
    assert line.startswith("environment.kwargs.game=Wordle-v0-train: ")
    assert words in line
    assert line.isprintable()


def test_a_fault_of_a_game_keeps_its_kind(monkeypatch):
    def make(game, **options):
        raise IndexError("list index out of range")

    monkeypatch.setattr(textarena, "make", make)
    with pytest.raises(EnvironmentFailure, match="IndexError"):
        copies("Wordle-v0-train")


@pytest.mark.parametrize("game", [*MOVES, "PegJump-v0-train", "Secretary-v0-train"])
def test_listed_moves_are_admissible(game):
    environment = copies(game, 1)
    seen = environment.reset(seed=1)[0]
    for number in range(20):
        choices = seen[0]["choices"]
        seen, _, ended, _, infos = environment.step([choices[number * 7 % len(choices)]])
        assert infos["error"][0] is None or "You hit a mine" in infos["error"][0]
        assert seen[0]["choices"] or ended[0]


def test_moves_that_change_nothing_are_not_listed():
    environment = copies("2048-v0-train", 1)
    environment.reset(seed=0)
    game = environment.envs[0].unwrapped
    game._game.state.game_state["board"] = [[2, 0, 0, 0], *([0] * 4 for _ in range(3))]
    assert game._read()["choices"] == ("[down]", "[right]")
    game._game.state.game_state["board"] = [[2, 2, 4, 8], *([0] * 4 for _ in range(3))]
    assert game._read()["choices"] == ("[down]", "[left]", "[right]")


def test_a_game_of_other_moves_has_no_choices():
    assert "choices" not in copies("RushHour-v0-train", 1).single_observation_space.spaces
    plain = GymnasiumEnv(
        id="etpo_tasks.textarena_env:etpo/TextArena-v0",
        kwargs={"game": "FrozenLake-v0-train", "choices": False},
    )
    assert "choices" not in plain.reset(seed=0)[0][0]


def test_too_many_moves_are_one_line():
    environment = copies("Mastermind-v0-extreme-train", 1)
    with pytest.raises(
        ConfigError, match=r"^environment\.kwargs\.choices=True: .*allowed is false$"
    ):
        environment.reset(seed=0)
