"""Sokoban with one box on a board of 6x6 cells."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from etpo.errors import check_range
from etpo_tasks.worlds import KEY, Example, Split, World, check_level, draw, shown

MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
SIZE = 6  # with the walls around the board
INNER = [(row, column) for row in range(1, SIZE - 1) for column in range(1, SIZE - 1)]
BORDER = {(row, column) for row in range(SIZE) for column in range(SIZE)} - set(INNER)
LEVELS = {1: (1, 3), 2: (4, 6), 3: (7, 20)}  # lengths of the shortest solution
MAX_STEPS = 20
RULES = "Push the box X to the goal O. You are P, walls are #, and boxes cannot be pulled."
Cell = tuple[int, int]  # row, column


class Board(NamedTuple):
    """Positions on the board; nothing can enter `walls`."""

    walls: frozenset[Cell]
    goal: Cell
    box: Cell
    player: Cell

    def moved(self, move: str) -> "Board":
        """Return the board after a move; the same board if a wall is in the way."""
        to = shifted(self.player, move)
        box = shifted(self.box, move) if to == self.box else self.box
        return self if {to, box} & self.walls else self._replace(box=box, player=to)

    def __str__(self) -> str:
        """Return a line per row: # wall, _ floor, O goal, X box, P player, S player on the goal."""
        marks = dict.fromkeys(self.walls, "#") | {self.goal: "O", self.box: "X"}
        marks[self.player] = "S" if self.player == self.goal else "P"
        rows = ([marks.get((row, column), "_") for column in range(SIZE)] for row in range(SIZE))
        return "\n".join(map(" ".join, rows))


def shifted(cell: Cell, move: str) -> Cell:
    """Return the next cell in the direction of a move."""
    return cell[0] + MOVES[move][0], cell[1] + MOVES[move][1]


def shortest(board: Board) -> list[str] | None:
    """Return the shortest solution, by breadth-first search; None without one."""
    queue: list[tuple[Board, list[str]]] = [(board, [])]
    seen = {board}
    for now, moves in queue:  # grows in the loop
        if now.box == now.goal:
            return moves
        for move in MOVES:
            following = now.moved(move)
            if following not in seen:
                seen.add(following)
                queue.append((following, [*moves, move]))
    return None


def sample(random: np.random.Generator, level: int) -> tuple[Board, str]:
    """Draw boards until the solution has the level's length; return it and the first move."""
    low, high = LEVELS[level]
    while True:
        places = [INNER[index] for index in random.permutation(len(INNER))]
        walls = frozenset(BORDER | set(places[3 : 3 + int(random.integers(4))]))
        board = Board(walls, *places[:3])
        solution = shortest(board)
        if solution is not None and low <= len(solution) <= high:
            return board, solution[0]


class SokobanEnv(World):
    """Push the box to the goal; the reward at the end is 1.

    Every board has a solution and 0 to 3 walls in addition to the border. Registered as
    `etpo/Sokoban-v0`, truncated after 20 moves.

    Args:
        level: 1: the shortest solution has 1 to 3 moves; 2: 4 to 6; 3: 7 to 20.
        step_cost: subtracted from the reward of every move, for example 0.1 as in gym-sokoban.
        kwargs: arguments of `World`.
    """

    def __init__(self, *, level: int = 1, step_cost: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_level(level, LEVELS)
        check_range(f"{KEY}.step_cost", step_cost, 0, 1)
        self.level, self.step_cost = level, step_cost
        self.board: Board

    def start(self, split: Split) -> None:
        self.board = self._draw(self.np_random, split)[0]

    def examples(self, count: int) -> list[Example]:
        """Return `count` boards that no episode has, with the first move of a solution."""
        random = np.random.default_rng(self.split_seed)
        drawn = [self._draw(random, Split.EXAMPLE) for _ in range(count)]
        return [(shown(*texts_of(board)), move) for board, move in drawn]

    def texts(self) -> tuple[str, str]:
        return texts_of(self.board)

    def admissible(self) -> Sequence[str]:
        return tuple(MOVES)

    def act(self, action: str, error: str | None) -> tuple[float, bool]:
        if error is None:
            self.board = self.board.moved(action)
        won = self.board.box == self.board.goal
        return float(won) - self.step_cost, won

    def _draw(self, random: np.random.Generator, split: Split) -> tuple[Board, str]:
        return draw(lambda: sample(random, self.level), split, self.split_seed, key=first)


def texts_of(board: Board) -> tuple[str, str]:
    """Return instruction and prefix of a board."""
    text = f"{RULES}\n{board}\n"
    return f"{text}Answer with up, down, left or right.", f"{text}Move: "


def first(drawn: tuple[Board, str]) -> str:
    """Return the text of a drawn board."""
    return str(drawn[0])


gymnasium.register("etpo/Sokoban-v0", entry_point=SokobanEnv, max_episode_steps=MAX_STEPS)
