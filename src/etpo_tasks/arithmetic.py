"""Sums, differences and products of digits, one question per episode."""

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np

from etpo.errors import ConfigError, check_integer
from etpo_tasks.worlds import KEY, Split, World, split_of

DIGITS = range(10)
ANSWERS = tuple(str(number) for number in range(82))  # up to 9*9
QUESTIONS = {
    "sums": {f"{a}+{b} =": a + b for a in DIGITS for b in DIGITS},
    "differences": {f"{a}-{b} =": a - b for a in DIGITS for b in range(a + 1)},
    "products": {f"{a}*{b} =": a * b for a in DIGITS for b in DIGITS},
}


class ArithmeticEnv(World):
    """Answer a question such as `7+6 =`; the reward is 1 for the number, else 0.

    The prefix has one worked example per line before the question, the same ones in each episode.
    Registered as `etpo/Arithmetic-v0`.

    Args:
        operations: some of sums, differences (none is negative) and products.
        examples: number of worked examples in the prefix; none is a question.
        choices: include the numbers from 0 to 81 as admissible actions.
        kwargs: arguments of `World`.
    """

    def __init__(
        self,
        *,
        operations: Sequence[str] = tuple(QUESTIONS),
        examples: int = 4,
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
        check_integer(f"{KEY}.examples", examples, 0, len(self.questions[Split.EXAMPLE]))
        self.lines = [f"{question} {answer}" for question, answer in self.examples(examples)]

    def examples(self, count: int) -> list[tuple[str, str]]:
        """Return up to `count` questions that no episode has, with answers, of all operations."""
        shuffled = np.random.default_rng(self.split_seed).permutation(self.questions[Split.EXAMPLE])
        queues = [[q for q in shuffled if q in QUESTIONS[name]] for name in self.operations]
        turns = [queue[i] for i in range(len(shuffled)) for queue in queues if i < len(queue)]
        return [(str(question), str(self._all()[question])) for question in turns[:count]]

    def start(self, split: Split) -> None:
        self.question = str(self.np_random.choice(self.questions[split]))

    def texts(self) -> tuple[str, str]:
        return self.question, "\n".join([*self.lines, self.question])

    def admissible(self) -> Sequence[str]:
        return ANSWERS

    def act(self, action: str, error: str | None) -> tuple[float, bool]:
        return float(action == str(self._all()[self.question])), True

    def _all(self) -> dict[str, int]:
        return {q: answer for name in self.operations for q, answer in QUESTIONS[name].items()}


gymnasium.register("etpo/Arithmetic-v0", entry_point=ArithmeticEnv)
