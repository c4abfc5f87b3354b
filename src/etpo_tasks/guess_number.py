"""Guess a number in a few guesses, with `higher` or `lower` after each one."""

from collections.abc import Iterator, Sequence
from typing import Any

import gymnasium
import numpy as np

from etpo.errors import check_integer
from etpo_tasks.worlds import KEY, Example, Split, World, draw, shown

Guess = tuple[str, str]  # the guess and its answer


class GuessNumberEnv(World):
    """Guess a number of a range in a few guesses; the reward at the end is 1.

    A range begins at a number from 1 to `starts`. With more than one start, evaluation and example
    games have ranges that training never draws; otherwise all draw the same numbers. The prefix has
    a line per guess, such as `> 12 lower`, after `example_games` games of a bisection. Registered
    as `etpo/GuessNumber-v0`.

    Args:
        numbers: size of a range.
        starts: largest first number of a range.
        guesses: number of guesses; bisection needs ceil(log2(numbers + 1)).
        example_games: number of games in the prefix before the present one.
        kwargs: arguments of `World`.
    """

    def __init__(
        self,
        *,
        numbers: int = 15,
        starts: int = 1,
        guesses: int = 4,
        example_games: int = 2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_integer(f"{KEY}.numbers", numbers, 2, 1000)
        check_integer(f"{KEY}.starts", starts, 1, 1000)
        check_integer(f"{KEY}.guesses", guesses, 1, numbers)
        check_integer(f"{KEY}.example_games", example_games, 0, numbers)
        self.numbers, self.starts, self.guesses = numbers, starts, guesses
        random = np.random.default_rng(self.split_seed)
        self.before = ""
        for i in range(example_games):
            low = self._draw(random, Split.EXAMPLE)
            number = low + max(0, (i + 1) * (numbers // (example_games + 1)) - 1)
            lines = map(line, bisection(number, low, low + numbers - 1))
            self.before += self._header(low) + "\n".join(lines) + "\n\n"
        self.low, self.number, self.past = 1, 1, []

    def examples(self, count: int) -> list[Example]:
        """Return up to `count` states and guesses of bisections."""
        states: dict[str, Example] = {}
        low = self._draw(np.random.default_rng(self.split_seed), Split.EXAMPLE)
        for number in range(low, low + self.numbers):
            game = list(bisection(number, low, low + self.numbers - 1))
            for turn, (guess, _) in enumerate(game):
                texts = self._texts(low, game[:turn], "")
                states.setdefault(texts[0], (shown(*texts), guess))
        return list(states.values())[:count]

    def start(self, split: Split) -> None:
        self.low = self._draw(self.np_random, split)
        self.number = self.low + int(self.np_random.integers(self.numbers))
        self.past: list[Guess] = []

    def texts(self) -> tuple[str, str]:
        return self._texts(self.low, self.past, self.before)

    def admissible(self) -> Sequence[str]:
        return [str(number) for number in range(self.low, self.low + self.numbers)]

    def read(self, action: str) -> str:
        """Return the first word; a model may go on with the answer to its guess."""
        return super().read(action).partition(" ")[0]

    def act(self, action: str, error: str | None) -> tuple[float, bool]:
        answer = "is not a number" if error else compared(int(action), self.number)
        self.past.append((action[:20], answer))
        won = answer == "right"
        return float(won), won or len(self.past) == self.guesses

    def _draw(self, random: np.random.Generator, split: Split) -> int:
        """Return the first number of a range."""
        if self.starts == 1:
            return 1
        return draw(lambda: int(random.integers(1, self.starts + 1)), split, self.split_seed)

    def _header(self, low: int) -> str:
        """Return the line of a game's range if ranges differ."""
        return f"{low} to {low + self.numbers - 1}\n" if self.starts > 1 else ""

    def _texts(self, low: int, past: Sequence[Guess], before: str) -> tuple[str, str]:
        lines = "".join(f"{line(guess)}\n" for guess in past)
        left = f"You have {self.guesses - len(past)} guesses left. Answer with a number."
        return (
            f"Guess a number from {low} to {low + self.numbers - 1}.\n{lines}{left}",
            f"{before}{self._header(low)}{lines}> ",
        )


def line(guess: Guess) -> str:
    """Return the line of a guess and its answer."""
    return f"> {guess[0]} {guess[1]}"


def compared(guess: int, number: int) -> str:
    """Return where the number is, seen from a guess."""
    return "right" if guess == number else "higher" if number > guess else "lower"


def bisection(number: int, low: int, high: int) -> Iterator[Guess]:
    """Yield the guesses of a bisection of `low` to `high`, with their answers."""
    while True:
        guess = (low + high) // 2
        answer = compared(guess, number)
        yield str(guess), answer
        if answer == "right":
            return
        low, high = (guess + 1, high) if answer == "higher" else (low, guess - 1)


gymnasium.register("etpo/GuessNumber-v0", entry_point=GuessNumberEnv)
