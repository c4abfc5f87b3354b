"""Sums, differences and products of digits, one question per episode."""

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np

from etpo.errors import ConfigError
from etpo_tasks.worlds import KEY, Example, Split, World, shown, split_of

DIGITS = range(10)
ANSWERS = tuple(str(number) for number in range(82))  # up to 9*9
QUESTIONS = {
    "sums": {f"{a}+{b} = ": a + b for a in DIGITS for b in DIGITS},
    "differences": {f"{a}-{b} = ": a - b for a in DIGITS for b in range(a + 1)},
    "products": {f"{a}*{b} = ": a * b for a in DIGITS for b in DIGITS},
}


class ArithmeticEnv(World):
    """Answer a question such as `7+6 =`; the reward is 1 for the number, else 0.

    Registered as `etpo/Arithmetic-v0`.

    Args:
        operations: some of sums, differences (none is negative) and products.
        choices: include the numbers from 0 to 81 as admissible actions.
        kwargs: arguments of `World`.
    """

    def __init__(
        self,
        *,
        operations: Sequence[str] = tuple(QUESTIONS),
        choices: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(choices=choices, **kwargs)
        known = not isinstance(operations, str) and set(operations) <= set(QUESTIONS)
        if not known or not operations:
            allowed = f"a list of some of {', '.join(QUESTIONS)}"
            raise ConfigError(f"{KEY}.operations={operations}: allowed is {allowed}")
        self.operations = tuple(operations)
        self.questions: dict[Split, list[str]] = {
            split: [q for q in self._all() if split_of(q, self.split_seed) is split]
            for split in Split
        }

    def examples(self, count: int) -> list[Example]:
        """Return up to `count` questions that no episode has, with answers, of all operations."""
        shuffled = np.random.default_rng(self.split_seed).permutation(self.questions[Split.EXAMPLE])
        queues = [[q for q in shuffled if q in QUESTIONS[name]] for name in self.operations]
        turns = [queue[i] for i in range(len(shuffled)) for queue in queues if i < len(queue)]
        return [(shown(*texts_of(q)), str(self._all()[q])) for q in map(str, turns[:count])]

    def start(self, split: Split) -> None:
        self.question = str(self.np_random.choice(self.questions[split]))

    def texts(self) -> tuple[str, str]:
        return texts_of(self.question)

    def admissible(self) -> Sequence[str]:
        return ANSWERS

    def act(self, action: str, error: str | None) -> tuple[float, bool]:
        return float(action == str(self._all()[self.question])), True

    def _all(self) -> dict[str, int]:
        return {q: answer for name in self.operations for q, answer in QUESTIONS[name].items()}


def texts_of(question: str) -> tuple[str, str]:
    """Return instruction and prefix of a question."""
    return question.strip(), question


gymnasium.register("etpo/Arithmetic-v0", entry_point=ArithmeticEnv)
