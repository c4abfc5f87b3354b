"""Data sets that a rule generates, without a file or network."""

from itertools import product

import pandas as pd

_LINES = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))


def tic_tac_toe() -> pd.DataFrame:
    """Return all 958 boards at the end of a game in which x moves first (OpenML 50), sorted.

    Cells are x, o or b (blank); the class is positive if x has won.
    """
    columns = [
        f"{r}-{c}-square"
        for r, c in product(("top", "middle", "bottom"), ("left", "middle", "right"))
    ]
    rows = []
    for board in product("box", repeat=9):
        x_wins, o_wins = (any(all(board[i] == p for i in line) for line in _LINES) for p in "xo")
        ahead = board.count("x") - board.count("o")
        is_draw = ahead == 1 and "b" not in board and not x_wins and not o_wins
        if (
            is_draw
            or (x_wins and not o_wins and ahead == 1)
            or (o_wins and not x_wins and ahead == 0)
        ):
            rows.append((*board, "positive" if x_wins else "negative"))
    return pd.DataFrame(rows, columns=[*columns, "Class"])


def balance_scale() -> pd.DataFrame:
    """Return the grid of two weights and two distances in 1..5 (OpenML 11, 625 rows).

    The class is the side with the larger product of weight and distance: L, R or B (balanced).
    """
    rows = []
    for left_weight, left_distance, right_weight, right_distance in product(range(1, 6), repeat=4):
        left, right = left_weight * left_distance, right_weight * right_distance
        side = "L" if left > right else "R" if right > left else "B"
        rows.append((left_weight, left_distance, right_weight, right_distance, side))
    columns = ["left-weight", "left-distance", "right-weight", "right-distance", "class"]
    return pd.DataFrame(rows, columns=columns)
