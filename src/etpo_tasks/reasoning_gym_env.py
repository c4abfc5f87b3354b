"""Questions of reasoning_gym (arXiv 2505.24760), one per episode.

They need the package `reasoning-gym`: `pip install -e ".[reasoning-gym]"`.
"""

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np

from etpo.errors import ConfigError, described, one_line
from etpo_tasks.worlds import KEY, Example, Split, World, draw, shown

SIZE = 100_000  # questions of a data set; options.size replaces it


class ReasoningGymEnv(World):
    """Answer a question of a data set; the reward is its `score_answer`, from 0 to 1.

    Questions of training, of evaluation and of worked examples differ. An exception of
    `score_answer` is a failure with reward 0. Registered as `etpo/ReasoningGym-v0`.

    Args:
        dataset: name of the data set.
        options: arguments of the data set, for example its difficulty.
        kwargs: arguments of `World`.

    Raises:
        ConfigError: `dataset` or `options` are not valid.
        ImportError: without `reasoning_gym`.
    """

    def __init__(
        self,
        *,
        dataset: str,
        options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(choices=False, **kwargs)
        try:
            from reasoning_gym import create_dataset
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            extra = 'pip install -e ".[reasoning-gym]"'
            raise ImportError(f"reasoning_gym is missing: {extra}") from error
        if dataset not in DATASETS or dataset == "composite":  # of other data sets
            raise ConfigError(
                f"{KEY}.dataset={dataset}: allowed are names of reasoning_gym such as chain_sum, "
                "letter_counting, syllogism"
            )
        try:
            self.dataset = create_dataset(dataset, **{"seed": 0, "size": SIZE, **(options or {})})
            self.entry = self.dataset[0]
        except (AssertionError, ValueError, TypeError) as error:
            text = one_line(str(error)) or "invalid"
            raise ConfigError(
                f"{KEY}.options={dict(options or {})}: {text}; allowed are arguments of {dataset}"
            ) from error

    def examples(self, count: int) -> list[Example]:
        """Return `count` questions that no episode has, with their answers."""
        random = np.random.default_rng(self.split_seed)
        entries = [self._draw(random, Split.EXAMPLE) for _ in range(count)]
        pairs = [(entry["question"], str(entry["answer"])) for entry in entries]
        return [(shown(question, prefix(question)), answer) for question, answer in pairs]

    def start(self, split: Split) -> None:
        self.entry = self._draw(self.np_random, split)

    def texts(self) -> tuple[str, str]:
        question = self.entry["question"]
        return question, prefix(question)

    def step(self, action: str) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Score the whole action, without white space around it."""
        reward, error = 0.0, None
        try:
            reward = float(self.dataset.score_answer(action.strip(), self.entry))
        except Exception as raised:  # scorers parse any text
            error = described(raised)
        return self.observe(), reward, True, False, {"error": error}

    def _draw(self, random: np.random.Generator, split: Split) -> dict[str, Any]:
        return draw(
            lambda: self.dataset[int(random.integers(len(self.dataset)))],
            split,
            self.split_seed,
            key=lambda entry: entry["question"],
        )


def prefix(question: str) -> str:
    """Return a question up to its answer."""
    return f"Q: {question}\nA: "


gymnasium.register("etpo/ReasoningGym-v0", entry_point=ReasoningGymEnv)
