"""Base class of the small worlds: disjoint instances, admissible actions, worked examples."""

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, TypeVar

import gymnasium
from gymnasium import spaces

from etpo.environments.text_env import AnyText
from etpo.errors import ConfigError, check_integer

KEY = "environment.kwargs"
MAX_DRAWS = 10_000
Instance = TypeVar("Instance")
Example = tuple[dict[str, str], str]  # texts of an observation, and the right action


class Split(Enum):
    """Disjoint parts of all instances, with the end of their range of hash values in percent."""

    EXAMPLE = 10
    HELD_OUT = 30
    TRAIN = 100


def split_of(text: str, split_seed: int = 0) -> Split:
    """Return the part of an instance by a hash of its text; equal instances share a part."""
    digest = hashlib.sha256(f"{split_seed}\n{text}".encode()).digest()
    percent = int.from_bytes(digest[:8]) % 100
    return next(split for split in Split if percent < split.value)


def draw(
    sample: Callable[[], Instance],
    split: Split,
    split_seed: int = 0,
    key: Callable[[Instance], str] = str,
) -> Instance:
    """Sample until an instance belongs to `split`.

    key: Return the text of an instance.

    Raises:
        ConfigError: no sampled instance does.
    """
    for _ in range(MAX_DRAWS):
        instance = sample()
        if split_of(key(instance), split_seed) is split:
            return instance
    part = split.name.lower().replace("_", "-")
    raise ConfigError(
        f"{KEY}: the {part} part is empty; allowed are arguments with more different instances, or "
        "another split_seed"
    )


class World(gymnasium.Env):
    """A text environment with admissible actions, drawn instances and a held-out part.

    `reset(options={"evaluation": True})` draws a held-out instance. An inadmissible action is a
    failure (`info["error"]`) without effect. Only the first line of an action is used,
    without blanks and full stops around it, in upper or lower case.

    Args:
        choices: include the admissible actions in observations.
        split_seed: seed of the held-out part; independent of the run's seed.
        render_mode: `ansi` or None.
    """

    metadata: Mapping[str, Any] = {"render_modes": ["ansi"], "render_fps": 1}

    def __init__(
        self, *, choices: bool = True, split_seed: int = 0, render_mode: str | None = None
    ) -> None:
        check_flag("choices", choices)
        check_integer(f"{KEY}.split_seed", split_seed, 0)
        self.split_seed, self.render_mode = split_seed, render_mode
        self.action_space = AnyText()
        fields: dict[str, spaces.Space] = {"instruction": AnyText(), "prefix": AnyText()}
        if choices:
            fields["choices"] = spaces.Sequence(AnyText())
        self.observation_space = spaces.Dict(fields)

    @abstractmethod
    def start(self, split: Split) -> None:
        """Draw an instance of `split` with `self.np_random` and start it."""

    @abstractmethod
    def texts(self) -> tuple[str, str]:
        """Return the instruction and the prefix of the present state.

        The prefix ends with a blank, which belongs to the action if the tokenizer merges the two.
        """

    @abstractmethod
    def admissible(self) -> Sequence[str]:
        """Return the admissible actions of the present state."""

    @abstractmethod
    def act(self, action: str, error: str | None) -> tuple[float, bool]:
        """Take an action and return the reward and whether the episode has ended.

        With an `error` the action is not admissible and only takes time.
        """

    def read(self, action: str) -> str:
        """Return the part of an action that counts: its first line, without blanks and stops."""
        return action.strip().partition("\n")[0].strip(" .")

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        evaluation = (options or {}).get("evaluation")
        self.start(Split.HELD_OUT if evaluation else Split.TRAIN)
        return self.observe(), {}

    def step(self, action: str) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        line = self.read(action)
        found = [known for known in self.admissible() if known.lower() == line.lower()]
        error = None if found else f"{line[:80]!r} is not possible"
        reward, terminated = self.act(*found or [line], error)
        return self.observe(), reward, terminated, False, {"error": error}

    def render(self) -> str:
        """Return the instruction of the present state."""
        return self.texts()[0]

    def observe(self) -> dict[str, Any]:
        """Return the observation of the present state."""
        observation: dict[str, Any] = {**shown(*self.texts())}
        if "choices" in self.observation_space.spaces:
            observation["choices"] = tuple(self.admissible())
        return observation


def shown(instruction: str, prefix: str) -> dict[str, str]:
    """Return the texts of an observation."""
    return {"instruction": instruction, "prefix": prefix}


def check_flag(name: str, value: object) -> None:
    """Raise ConfigError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise ConfigError(f"{KEY}.{name}={value}: allowed are true, false")


def check_level(level: object, levels: Mapping[int, Any]) -> None:
    """Raise ConfigError unless `level` is a key of `levels`."""
    if type(level) is not int or level not in levels:
        raise ConfigError(f"{KEY}.level={level}: allowed are {', '.join(map(str, levels))}")
