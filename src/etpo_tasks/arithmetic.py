"""Sums, differences and products of small numbers, one question per episode."""

import operator
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np

from etpo.errors import ConfigError, check_integer
from etpo_tasks.worlds import KEY, Example, Split, World, shown, split_of

OPERATIONS = {"sums": "+", "differences": "-", "products": "*"}


def questions_of(operation: str, smallest: int, largest: int) -> dict[str, int]:
    """Return all questions of an operation with their answers; no difference is negative."""
    numbers, sign = range(smallest, largest + 1), OPERATIONS[operation]
    pairs = [(a, b) for a in numbers for b in numbers if operation != "differences" or a >= b]
    results = {"+": operator.add, "-": operator.sub, "*": operator.mul}
    return {f"{a}{sign}{b} = ": results[sign](a, b) for a, b in pairs}


class ArithmeticEnv(World):
    """Answer a question such as `7+6 =`; the reward is 1 for the number, else 0.

    Registered as `etpo/Arithmetic-v0`.

    Args:
        operations: some of sums, differences (none is negative) and products.
        smallest, largest: range of the numbers; 0 and 1 make easy questions.
        choices: include all numbers up to the largest answer as admissible actions.
        kwargs: arguments of `World`.
    """

    def __init__(
        self,
        *,
        operations: Sequence[str] = tuple(OPERATIONS),
        smallest: int = 2,
        largest: int = 9,
        choices: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(choices=choices, **kwargs)
        known = not isinstance(operations, str) and set(operations) <= set(OPERATIONS)
        if not known or not operations:
            allowed = f"a list of some of {', '.join(OPERATIONS)}"
            raise ConfigError(f"{KEY}.operations={operations}: allowed is {allowed}")
        check_integer(f"{KEY}.largest", largest, 5, 100)
        check_integer(f"{KEY}.smallest", smallest, 0, largest - 5)
        self.tables = [questions_of(operation, smallest, largest) for operation in operations]
        self.answers = {q: answer for table in self.tables for q, answer in table.items()}
        self.parts: dict[Split, list[str]] = {
            split: [q for q in self.answers if split_of(q, self.split_seed) is split]
            for split in Split
        }

    def examples(self, count: int) -> list[Example]:
        """Return up to `count` questions that no episode has, with answers, of all operations."""
        shuffled = np.random.default_rng(self.split_seed).permutation(self.parts[Split.EXAMPLE])
        queues = [[q for q in shuffled if q in table] for table in self.tables]
        turns = [queue[i] for i in range(len(shuffled)) for queue in queues if i < len(queue)]
        return [(shown(*texts_of(q)), str(self.answers[q])) for q in map(str, turns[:count])]

    def start(self, split: Split) -> None:
        self.question = str(self.np_random.choice(self.parts[split]))

    def texts(self) -> tuple[str, str]:
        return texts_of(self.question)

    def admissible(self) -> Sequence[str]:
        return [str(number) for number in range(max(self.answers.values()) + 1)]

    def act(self, action: str, error: str | None) -> tuple[float, bool]:
        return float(action == str(self.answers[self.question])), True


def texts_of(question: str) -> tuple[str, str]:
    """Return instruction and prefix of a question."""
    return question.strip(), question


gymnasium.register("etpo/Arithmetic-v0", entry_point=ArithmeticEnv)
