"""Data sets that follow from a rule: no file and no network is needed."""

from itertools import product

from etpo.environments.data_science.csv_file import Table

_LINES = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))


def tic_tac_toe() -> Table:
    """All 958 boards on which a game can end when x moves first (OpenML 50).

    Cells are x, o or b (blank); the class is positive where x has won. Rows in sorted order.
    """
    columns = [
        f"{row}-{column}-square"
        for row in ("top", "middle", "bottom")
        for column in ("left", "middle", "right")
    ]
    rows = [
        (*board, "positive" if _wins(board, "x") else "negative")
        for board in sorted(_final_boards())
    ]
    return Table((*columns, "Class"), rows)


def balance_scale() -> Table:
    """The whole grid of two weights and two distances in 1..5 (OpenML 11, 625 rows).

    The class is the side with the larger product of weight and distance: L, R or B (balanced).
    """
    rows = []
    for left_weight, left_distance, right_weight, right_distance in product(range(1, 6), repeat=4):
        left, right = left_weight * left_distance, right_weight * right_distance
        side = "L" if left > right else "R" if right > left else "B"
        cells = (left_weight, left_distance, right_weight, right_distance)
        rows.append((*map(str, cells), side))
    return Table(("left-weight", "left-distance", "right-weight", "right-distance", "class"), rows)


def _wins(board: str, player: str) -> bool:
    return any(all(board[cell] == player for cell in line) for line in _LINES)


def _final_boards() -> set[str]:
    """Every board that ends a game, move by move over sets of open boards."""
    open_boards, final = {"b" * 9}, set()
    for move in range(9):
        player = "xo"[move % 2]
        after = {
            board[:cell] + player + board[cell + 1 :]
            for board in open_boards
            for cell in range(9)
            if board[cell] == "b"
        }
        won = {board for board in after if _wins(board, player)}
        final |= won
        open_boards = after - won
    return final | open_boards
