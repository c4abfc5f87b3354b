"""Guess a number in a few guesses, with `higher` or `lower` after each one."""

from collections.abc import Iterator, Sequence
from typing import Any

import gymnasium

from etpo.errors import check_integer
from etpo_tasks.worlds import KEY, Example, Split, World, shown


class GuessNumberEnv(World):
    """Guess a number from 1 to `numbers` in `guesses` guesses; the reward at the end is 1.

    All numbers are drawn in training and in evaluation. The prefix has a line per guess, such as
    `> 12 lower`, after `example_games` games of a bisection. Registered as
    `etpo/GuessNumber-v0`.

    Args:
        numbers: largest number.
        guesses: number of guesses; bisection needs ceil(log2(numbers + 1)).
        example_games: number of games in the prefix before the present one.
        kwargs: arguments of `World`.
    """

    def __init__(
        self, *, numbers: int = 15, guesses: int = 4, example_games: int = 2, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check_integer(f"{KEY}.numbers", numbers, 2, 1000)
        check_integer(f"{KEY}.guesses", guesses, 1, numbers)
        check_integer(f"{KEY}.example_games", example_games, 0, numbers)
        self.numbers, self.guesses = numbers, guesses
        step = numbers // (example_games + 1)
        games = [bisection((i + 1) * step or 1, numbers) for i in range(example_games)]
        self.games = ["\n".join(map(line, game)) + "\n\n" for game in games]
        self.number, self.past = 1, []

    def examples(self, count: int) -> list[Example]:
        """Return up to `count` states and guesses of bisections."""
        states: dict[str, Example] = {}
        for number in range(1, self.numbers + 1):
            game = list(bisection(number, self.numbers))
            for turn, (guess, _) in enumerate(game):
                texts = self._texts(game[:turn], "")
                states.setdefault(texts[0], (shown(*texts), guess))
        return list(states.values())[:count]

    def start(self, split: Split) -> None:
        self.number = int(self.np_random.integers(1, self.numbers + 1))
        self.past: list[tuple[str, str]] = []

    def texts(self) -> tuple[str, str]:
        return self._texts(self.past, "".join(self.games))

    def admissible(self) -> Sequence[str]:
        return [str(number) for number in range(1, self.numbers + 1)]

    def read(self, action: str) -> str:
        """Return the first word; a model may go on with the answer to its guess."""
        return super().read(action).partition(" ")[0]

    def act(self, action: str, error: str | None) -> tuple[float, bool]:
        answer = "is not a number" if error else compared(int(action), self.number)
        self.past.append((action[:20], answer))
        won = answer == "right"
        return float(won), won or len(self.past) == self.guesses

    def _texts(self, past: Sequence[tuple[str, str]], before: str) -> tuple[str, str]:
        lines = "".join(f"{line(guess)}\n" for guess in past)
        left = f"You have {self.guesses - len(past)} guesses left. Answer with a number."
        return f"Guess a number from 1 to {self.numbers}.\n{lines}{left}", f"{before}{lines}> "


def line(guess: tuple[str, str]) -> str:
    """Return the line of a guess and its answer."""
    return f"> {guess[0]} {guess[1]}"


def compared(guess: int, number: int) -> str:
    """Return where the number is, seen from a guess."""
    return "right" if guess == number else "higher" if number > guess else "lower"


def bisection(number: int, high: int) -> Iterator[tuple[str, str]]:
    """Yield the guesses of a bisection of 1 to `high`, with their answers."""
    low = 1
    while True:
        guess = (low + high) // 2
        answer = compared(guess, number)
        yield str(guess), answer
        if answer == "right":
            return
        low, high = (guess + 1, high) if answer == "higher" else (low, guess - 1)


gymnasium.register("etpo/GuessNumber-v0", entry_point=GuessNumberEnv)
