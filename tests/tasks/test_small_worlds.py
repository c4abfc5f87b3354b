"""Rules and rewards of arithmetic, the guessing game, Sokoban and the frozen lake."""

import re

import numpy as np
import pytest

from etpo_tasks.arithmetic import ArithmeticEnv
from etpo_tasks.frozen_lake import TextFrozenLakeEnv, drawing
from etpo_tasks.guess_number import GuessNumberEnv, bisection
from etpo_tasks.sokoban import BORDER, LEVELS, Board, SokobanEnv, sample, shortest


@pytest.mark.parametrize("answer", ["right", " right\n8*8 =", "right."])
def test_the_right_number_pays(answer):
    environment = ArithmeticEnv()
    for seed in range(20):
        observation, _ = environment.reset(seed=seed)
        question = observation["instruction"]
        right = str(eval(question.removesuffix(" =")))
        result = environment.step(answer.replace("right", right))
        assert result[1:3] == (1.0, True)
        environment.reset(seed=seed)
        assert environment.step(right + "1")[1:3] == (0.0, True)
        environment.reset(seed=seed)
        _, reward, _, _, info = environment.step("It is " + right)
        assert reward == 0
        assert info["error"] is not None


def test_examples_of_arithmetic_are_right_and_of_all_operations():
    examples = ArithmeticEnv().examples(3)
    assert {question["prefix"][1] for question, _ in examples} == set("+-*")
    assert all(
        eval(question["prefix"].replace("=", "==") + answer) for question, answer in examples
    )


def test_operations_are_chosen():
    environment = ArithmeticEnv(operations=["differences"])
    questions = {environment.reset(seed=s)[0]["prefix"] for s in range(50)}
    pairs = [re.fullmatch(r"(\d+)-(\d+) = ", question).groups() for question in questions]
    assert all(9 >= int(a) >= int(b) >= 2 for a, b in pairs)
    zeros = ArithmeticEnv(operations=["products"], smallest=0)
    assert any("0" in zeros.reset(seed=s)[0]["prefix"] for s in range(50))


def test_bisection_finds_every_number_in_four_guesses():
    environment = GuessNumberEnv()
    for number in range(1, 16):
        environment.reset(seed=0)
        environment.number = number
        guesses = [guess for guess, _ in bisection(number, 1, 15)]
        rewards = [environment.step(guess)[1] for guess in guesses]
        assert len(guesses) <= 4
        assert rewards == [0.0] * (len(guesses) - 1) + [1.0]


def test_a_game_of_guesses_shows_its_answers_and_ends():
    environment = GuessNumberEnv(example_games=1)
    environment.reset(seed=0)
    environment.number = 5
    game = environment.step("12")[0]["prefix"].partition("\n\n")[2]
    assert game == "> 12 lower\n> "
    observation, *_, info = environment.step("99")
    assert observation["prefix"].endswith("> 12 lower\n> 99 is not a number\n> ")
    assert info["error"]
    assert environment.step("3 higher")[-1]["error"] is None
    _, reward, terminated, _, _ = environment.step("4")
    assert (reward, terminated) == (0.0, True)


def test_a_game_names_its_range():
    environment = GuessNumberEnv(starts=85, example_games=1)
    observation, _ = environment.reset(seed=0)
    low, high = environment.low, environment.low + 14
    assert observation["choices"] == tuple(map(str, range(low, high + 1)))
    assert observation["prefix"].partition("\n\n")[2] == f"{low} to {high}\n> "
    assert f"from {low} to {high}." in observation["instruction"]
    seen = {(environment.reset(seed=s), environment.low, environment.number)[1:] for s in range(99)}
    assert len(seen) > 50
    assert all(low <= number < low + 15 for low, number in seen)


def board(*rows):
    """Return the board of four inner rows of four cells."""
    cells = {(r + 1, c + 1): mark for r, row in enumerate(rows) for c, mark in enumerate(row)}
    place = {mark: cell for cell, mark in cells.items()}
    walls = {cell for cell, mark in cells.items() if mark == "#"}
    return Board(frozenset(BORDER | walls), place["O"], place["X"], place["P"])


def test_a_box_is_pushed_and_not_pulled_and_stops_at_walls():
    start = board("_PXO", "____", "____", "____")
    pushed = start.moved("right")
    assert (pushed.player, pushed.box) == ((1, 3), (1, 4))
    assert pushed.moved("left").box == (1, 4)
    assert pushed.moved("right") == pushed  # the box is at the wall
    assert start.moved("up") == start
    assert board("P#XO", "____", "____", "____").moved("right").player == (1, 1)


@pytest.mark.parametrize(
    ("rows", "moves"),
    [
        (("_PXO", "____", "____", "____"), 1),
        (("P_XO", "____", "____", "____"), 2),
        (("O___", "_X__", "P___", "____"), 5),
        (("X__O", "____", "P___", "____"), None),  # a box in a corner
    ],
)
def test_the_shortest_solution(rows, moves):
    found = shortest(board(*rows))
    assert (found and len(found)) == moves


@pytest.mark.parametrize("level", LEVELS)
def test_every_board_has_a_solution_of_its_level(level):
    random = np.random.default_rng(0)
    for _ in range(20):
        drawn, first = sample(random, level)
        moves = shortest(drawn)
        assert LEVELS[level][0] <= len(moves) <= LEVELS[level][1]
        assert moves[0] == first
        for move in moves:
            assert drawn.box != drawn.goal
            drawn = drawn.moved(move)
        assert drawn.box == drawn.goal


def test_sokoban_pays_at_the_end_less_the_cost_of_moves():
    environment = SokobanEnv(step_cost=0.1)
    environment.reset(seed=0)
    environment.board = board("P_XO", "____", "____", "____")
    assert environment.step("right")[1:3] == (-0.1, False)
    assert environment.step("Right.")[1:3] == (0.9, True)


def test_a_walk_over_the_ice():
    environment = TextFrozenLakeEnv()
    environment.reset(seed=0)
    environment.lake = environment._make("SFF\nFHF\nFFG")
    environment.lake.reset(seed=0)
    assert environment.texts()[1].endswith("\nP _ _\n_ O _\n_ _ G\nMove: ")
    ends = [environment.step(move)[1:3] for move in ("right", "right", "down", "down")]
    assert ends == [(0.0, False)] * 3 + [(1.0, True)]
    environment.lake = environment._make("SFF\nFHF\nFFG")
    environment.lake.reset(seed=0)
    assert [environment.step(m)[1:3] for m in ("right", "down")] == [(0.0, False), (0.0, True)]


def test_a_lake_is_shown_with_the_player():
    assert drawing(["SF", "HG"], 1) == "_ P\nO G"
