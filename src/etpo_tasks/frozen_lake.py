"""Gymnasium's FrozenLake as text, on random lakes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv, generate_random_map

from etpo_tasks.worlds import Example, Split, World, check_level, draw, shown

MOVES = ("left", "down", "right", "up")  # gymnasium's order
MAX_STEPS = 20
RULES = "Walk from P to the goal G over the frozen lake _ without falling into a hole O."
SLIPPERY = " The ice is slippery."


class Level(NamedTuple):
    """size: side of the lake; frozen: probability of ice; slippery: moves may go sideways."""

    size: int
    frozen: float
    slippery: bool


LEVELS = {1: Level(3, 0.8, False), 2: Level(4, 0.8, False), 3: Level(4, 0.8, True)}


class TextFrozenLakeEnv(World):
    """Walk to the goal; the reward there is 1, and a hole ends the episode.

    A path without holes exists on every lake. Registered as `etpo/FrozenLake-v0`, truncated after
    20 moves.

    Args:
        level: 1: lakes of 3x3 cells; 2: 4x4; 3: 4x4, and a move goes to each side with probability
            1/3 (slippery).
        kwargs: arguments of `World`.
    """

    def __init__(self, *, level: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_level(level, LEVELS)
        self.level = LEVELS[level]
        self.lake: FrozenLakeEnv

    def start(self, split: Split) -> None:
        self.lake = self._make(self._draw(self.np_random, split))
        self.lake.reset(seed=int(self.np_random.integers(2**31)))

    def examples(self, count: int) -> list[Example]:
        """Return `count` lakes that no episode has, with the first move of a shortest path."""
        random = np.random.default_rng(self.split_seed)
        lakes = [self._draw(random, Split.EXAMPLE).split("\n") for _ in range(count)]
        return [(shown(*self._texts(lake, 0)), first_move(lake, random)) for lake in lakes]

    def texts(self) -> tuple[str, str]:
        return self._texts(self.lake.desc.astype(str).tolist(), self.lake.s)

    def admissible(self) -> Sequence[str]:
        return MOVES

    def act(self, action: str, error: str | None) -> tuple[float, bool]:
        if error is not None:
            return 0.0, False
        _, reward, ended, *_ = self.lake.step(MOVES.index(action))
        return float(reward), bool(ended)

    def _make(self, lake: str) -> FrozenLakeEnv:
        return FrozenLakeEnv(desc=lake.split("\n"), is_slippery=self.level.slippery)

    def _draw(self, random: np.random.Generator, split: Split) -> str:
        def sample() -> str:
            seed = int(random.integers(2**31))
            return "\n".join(generate_random_map(self.level.size, self.level.frozen, seed=seed))

        return draw(sample, split, self.split_seed)

    def _texts(self, lake: Sequence[Sequence[str]], place: int) -> tuple[str, str]:
        text = f"{RULES}{SLIPPERY * self.level.slippery}\n{drawing(lake, place)}\n"
        return f"{text}Answer with left, down, right or up.", f"{text}Move: "


def drawing(lake: Sequence[Sequence[str]], place: int) -> str:
    """Return a line per row: P player, _ ice, O hole, G goal."""
    cells = ["_" if cell in "SF" else "O" if cell == "H" else "G" for row in lake for cell in row]
    cells[place] = "P"
    size = len(lake)
    return "\n".join(" ".join(cells[row : row + size]) for row in range(0, len(cells), size))


def first_move(lake: Sequence[str], random: np.random.Generator) -> str:
    """Return the first move of a random shortest path from the upper left cell, if none slips."""
    size = len(lake)
    steps = {"down": (1, 0), "right": (0, 1), "left": (0, -1), "up": (-1, 0)}
    steps = {move: steps[move] for move in random.permutation(list(steps)).tolist()}
    queue: list[tuple[tuple[int, int], str]] = [((0, 0), "")]
    seen = {(0, 0)}
    for (row, column), first in queue:  # grows in the loop
        if lake[row][column] == "G":
            return first
        for move, (down, right) in steps.items():
            to = row + down, column + right
            inside = to[0] in range(size) and to[1] in range(size)
            if inside and to not in seen and lake[to[0]][to[1]] != "H":
                seen.add(to)
                queue.append((to, first or move))
    raise ValueError("no path")


gymnasium.register("etpo/FrozenLake-v0", entry_point=TextFrozenLakeEnv, max_episode_steps=MAX_STEPS)
