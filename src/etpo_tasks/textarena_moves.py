"""Admissible moves of TextArena's single-player games."""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from itertools import permutations, product
from typing import Any

from etpo.errors import ConfigError

DIRECTIONS = ("up", "down", "left", "right")
MAX_CODES = 10_000


def hanoi(game: Any) -> Iterable[str]:
    """Yield the moves of a top disk to an empty tower or onto a larger disk."""
    towers = game.state.game_state["towers"]
    for source, target in permutations(towers, 2):
        if towers[source] and (not towers[target] or towers[target][-1] > towers[source][-1]):
            yield f"{source} {target}"


def steps(game: Any) -> Iterable[str]:
    """Yield the directions that stay on the lake."""
    row, column = game.state.game_state["player_pos"]
    possible = row > 0, row < game.size - 1, column > 0, column < game.size - 1
    return (move for move, free in zip(DIRECTIONS, possible, strict=True) if free)


def guess(game: Any) -> Iterable[str]:
    """Yield the numbers that were not guessed yet."""
    numbers = range(game.min_number, game.max_number + 1)
    return (str(number) for number in numbers if number not in game.guessed_numbers)


def mastermind(game: Any) -> Iterable[str]:
    """Yield the codes that were not guessed yet. Raises ConfigError beyond `MAX_CODES` codes."""
    digits = range(1, game.num_numbers + 1)
    if game.num_numbers**game.code_length > MAX_CODES:
        raise ConfigError("environment.kwargs.choices=True: too many codes; allowed is false")
    repeated = game.duplicate_numbers
    codes = (
        product(digits, repeat=game.code_length)
        if repeated
        else permutations(digits, game.code_length)
    )
    guessed = {tuple(entry["guess"]) for entry in game.state.game_state["history"]}
    return (" ".join(map(str, code)) for code in codes if code not in guessed)


def merges(game: Any) -> Iterable[str]:
    """Yield the directions that change the board of 2048."""
    before = game.state.game_state["board"]
    for index, direction in enumerate(DIRECTIONS):
        game.state.game_state["board"] = deepcopy(before)
        if game._apply_move(index)[0]:
            yield direction
    game.state.game_state["board"] = before


def slides(game: Any) -> Iterable[str]:
    """Yield the directions in which a tile can slide into the empty place."""
    row, column = game._get_empty_position()
    possible = row < 3, row > 0, column < 3, column > 0
    return (move for move, free in zip(DIRECTIONS, possible, strict=True) if free)


def jumps(game: Any) -> Iterable[str]:
    """Yield the jumps of a peg over another one into an empty hole."""
    board = game.state.game_state["board"]
    for start, over, end in game.ALLOWED_MOVES:
        if board[start] and board[over] and not board[end]:
            yield f"{start} {end}"


def hidden(game: Any) -> Iterable[str]:
    """Yield the cells of Minesweeper that are not revealed."""
    cells = product(range(game.rows), range(game.cols))
    return (f"{row} {column}" for row, column in cells if not game.revealed[row][column])


def lights(game: Any) -> Iterable[str]:
    """Yield all cells."""
    return (f"{row} {column}" for row, column in product(range(game.size), repeat=2))


MOVES: Mapping[str, Callable[[Any], Iterable[str]]] = {
    "2048": merges,
    "Bandit": lambda game: game.buttons,
    "Blackjack": lambda game: ("Hit", "Stand"),
    "FifteenPuzzle": slides,
    "FrozenLake": steps,
    "GuessTheNumber": guess,
    "LightsOut": lights,
    "Mastermind": mastermind,
    "Minesweeper": hidden,
    "PegJump": jumps,
    "Secretary": lambda game: ("accept", "continue"),
    "ThreeCardMonte": lambda game: map(str, range(game.num_cups)),
    "TowerOfHanoi": hanoi,
}


def moves_of(name: str) -> Callable[[Any], Iterable[str]] | None:
    """Return the function that lists the moves of a game, without brackets; None without one."""
    return MOVES.get(name.partition("-v0")[0])
